import json
from pathlib import Path

import pytest
import yaml

from prfaas.cli.main import main

K_FILE = {
    "name": "small",
    "description": "a small world",
    "wall_time_s": 100,
    "network": "hundred-gig",
    "models": [{"name": "m", "profile": "1t-hybrid-h20"}],
    "instances": [
        {"name": "far", "site": "east", "role": "prefill", "profile": "1t-hybrid-h200"},
        {"name": "decode", "site": "west", "role": "decode"},
    ],
    "router": {"site": "west", "policy": {"name": "naive"}},
    "workload": {
        "kind": "synthetic",
        "arrivals": {"process": "poisson", "rate_rps": 1},
        "input_tokens": 20000,
        "output_tokens": 50,
        "requests": 20,
    },
}


def write(folder: Path, **changes: object) -> str:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(K_FILE | changes))
    return str(path)


def test_json_is_one_object_in_the_form_of_a_run(tmp_path, capsys) -> None:
    assert main(["simulate", write(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["emulation"] == "simulated"
    assert len(result["repetitions"][0]["requests"]) == 20
    assert result["summaries"][0]["failed"] == 0


def test_a_run_leaves_its_record_its_figure_and_a_trace(tmp_path, capsys) -> None:
    out, trace = tmp_path / "out", tmp_path / "trace.json"
    assert main(["simulate", write(tmp_path), "--out", str(out), "--chrome-trace", str(trace)]) == 0
    assert (out / "run.json").exists()
    assert (out / "figures" / "simulation.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(trace.read_text())["traceEvents"]) >= 40
    assert "20 requests, 0 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"instances": [{"name": "x", "site": "north", "role": "collocated"}]}, "north"),
        ({"workload": K_FILE["workload"] | {"requests": -1}}, "workload"),
        ({"models": [{"name": "m", "profile": "nowhere"}]}, "nowhere"),
        ({"router": {"site": "west", "policy": {"name": "nonsense"}}}, "nonsense"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_fault(tmp_path, capsys, changes, named) -> None:
    assert main(["simulate", write(tmp_path, **changes)]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error
    assert error.count("\n") == 1
