import json
from pathlib import Path

import pytest
import yaml

from prfaas.cli._places import file_for
from prfaas.cli.main import main
from prfaas.config.places import checkout

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


def test_a_sweep_takes_a_file_whose_timeline_changes_a_link(tmp_path, capsys) -> None:
    change = {"do": "set_link", "at_s": 1, "link": "east<->west", "set": {"rate_mbps": 50}, "for_s": 1}
    sweep = ["--sweep", "seed=1,2"]
    assert main(["simulate", write(tmp_path, timeline=[change]), "--json", *sweep]) == 0
    assert len(figures(capsys.readouterr().out)) == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"instances": [{"name": "x", "site": "north", "role": "collocated"}]}, "north"),
        ({"workload": K_FILE["workload"] | {"requests": -1}}, "workload"),
        ({"models": [{"name": "m", "profile": "nowhere"}]}, "nowhere"),
        ({"router": {"site": "west", "policy": {"name": "nonsense"}}}, "nonsense"),
        ({"surprise": 1}, "surprise"),
        ({"timeline": [{"do": "link_down", "at_s": 1, "link": "east->north", "for_s": 3}]}, "'east->north'"),
        (
            {
                "timeline": [
                    {"do": "cross_traffic", "at_s": 1, "source": "east", "target": "north", "for_s": 3}
                ]
            },
            "east->north",
        ),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_fault(tmp_path, capsys, changes, named) -> None:
    assert main(["simulate", write(tmp_path, **changes)]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error
    assert error.count("\n") == 1


def figures(out: str) -> list[dict[str, object]]:
    """All that a run says but how long it took."""
    return [{k: v for k, v in one.items() if k != "took_s"} for one in json.loads(out)["summaries"]]


def test_a_sweep_runs_every_combination_alike_however_many_processes_do_it(tmp_path, capsys) -> None:
    sweep = [
        "--sweep", "workload.arrivals.rate_rps=0.5,1", "--sweep", "router.policy.name=naive,prices",
    ]  # fmt: skip
    words = ["simulate", write(tmp_path), "--json", "--repetitions", "2", *sweep]
    assert main([*words, "--workers", "1"]) == 0
    one = figures(capsys.readouterr().out)
    assert main([*words, "--workers", "2"]) == 0
    assert figures(capsys.readouterr().out) == one
    rates = ("rate_rps=0.5", "rate_rps=1")
    assert [row["part"] for row in one[::2]] == [f"{r},name={n}" for r in rates for n in ("naive", "prices")]
    assert [row["policy"] for row in one[::2]] == ["naive", "prices", "naive", "prices"]
    assert len({row["ttft_mean_s"] for row in one}) == 4  # rates and seeds: there is one way for all policies


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--sweep", "workload.requests"], "expected FIELD=VALUE,VALUE"),
        (["--sweep", "workload.requests=5,-5"], "requests=-5"),
        (["--sweep", "workload.surprise=5"], "surprise"),
        (["--workers", "0"], "--workers"),
        (["--sweep", "models=[]"], "models"),
        (["--sweep", "network=hundred-gig,nowhere", "--workers", "2"], "nowhere"),
    ],
)
def test_a_bad_sweep_is_one_line_that_names_the_fault(tmp_path, capsys, words, named) -> None:
    assert main(["simulate", write(tmp_path), "--json", *words]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--out", "{file}"], "--out"),
        (["--out", "{file}/below"], "--out"),
        (["--out", "/proc/nowhere"], "--out"),
        (["--chrome-trace", "{folder}"], "--chrome-trace"),
        (["--chrome-trace", "{folder}/nowhere/trace.json"], "--chrome-trace"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_anything_runs(tmp_path, capsys, words, named) -> None:
    path = write(tmp_path)
    said = [word.format(file=path, folder=tmp_path) for word in words]
    assert main(["simulate", path, *said]) == 2
    out, error = capsys.readouterr()
    assert named in error
    assert error.count("\n") == 1
    assert out == ""


def test_the_place_without_an_option_is_looked_at_before_anything_runs_too(
    tmp_path, capsys, monkeypatch
) -> None:
    file = tmp_path / "a-file"
    file.write_text("")
    (tmp_path / "topologies").symlink_to(checkout() / "topologies")
    (tmp_path / "results").symlink_to(file)
    monkeypatch.setattr("prfaas.cli.simulate.checkout", lambda: tmp_path)
    monkeypatch.setattr("prfaas.cli.simulate.play_all", lambda *_: pytest.fail("it ran"))
    assert main(["simulate", "hello"]) == 2
    assert "no folder can be made there" in capsys.readouterr().err


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, capsys) -> None:
    assert main(["simulate", write(tmp_path), "--chrome-trace", "/dev/full", "--out", str(tmp_path)]) == 3
    assert capsys.readouterr().err.endswith("/dev/full: can't be written: No space left on device\n")


def test_what_was_only_looked_at_is_not_there(tmp_path) -> None:
    path = tmp_path / "trace.json"
    assert file_for("--chrome-trace", path) == path
    assert not path.exists()
    path.write_text("{}")
    file_for("--chrome-trace", path)
    assert path.read_text() == "{}"


def test_a_kill_of_the_router_is_said_to_be_beyond_it(tmp_path, capsys) -> None:
    kill = {"do": "kill", "at_s": 1, "instance": "router"}
    assert main(["simulate", write(tmp_path, timeline=[kill]), "--out", str(tmp_path / "out")]) == 0
    assert "not simulated: at 1 s: kill of a router isn't simulated" in capsys.readouterr().out


def test_a_policy_without_a_name_is_bad_usage_and_not_the_file_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "one-t", "--policy="]) == 2
    assert "policy '' is unknown; known: " in capsys.readouterr().err
