from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from prfaas.cli.main import main

K_TOPOLOGIES = Path(__file__).parents[3] / "topologies"
K_CASES = K_TOPOLOGIES / "cases"
K_CASE = str(K_CASES / "case_1t_hybrid.yaml")


def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", K_CASE, "--json", "--threshold", "19400", "--prefill", "3"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["threshold_tokens"] == 19_400
    assert result["throughput_rps"] == pytest.approx(3.184, abs=0.001)
    assert result["homogeneous"]["prefill"] == 9
    assert err == ""


def test_text_shows_the_published_beside_ours_and_what_was_solved_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", K_CASE]) == 0
    out = capsys.readouterr().out
    assert "PrfaaS over homogeneous: 1.540" in out
    assert "solved back, not published: local.profile, decode.max_batch" in out
    line = next(line for line in out.splitlines() if "egress_gbps" in line)
    assert line.split()[2:5] == ["13", "11.94", "0.919"]


def test_another_link_changes_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", K_CASE, "--json", "--egress-gbps", "5"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["prefill"], result["decode"]) == (5, 3)
    assert result["limited_by"] in ("link", "local prefill")


def test_an_slo_is_sized_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", K_CASE, "--slo-ttft-s", "6", "--slo-rate-rps", "3"]) == 0
    assert "Instances for 3 req/s with a TTFT of at most 6 s for 90%" in capsys.readouterr().out


def test_a_trace_with_reuse_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--json", "--topologies", str(K_TOPOLOGIES)]
    assert main(["plan", str(K_CASES / "conversation_trace.yaml"), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    # Prompts average 12,035 tokens; the cache leaves less to prefill.
    assert result["homogeneous"]["l_short_tokens"] == pytest.approx(7826, abs=10)
    assert result["cost"]["unit"] == "USD"
    assert result["sizing"]["prfaas_instances"] >= 1


def test_several_sites_and_the_table_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(K_CASES / "three_sites.yaml")]) == 0
    out = capsys.readouterr().out
    assert "Highest rate of the whole: 5.7" in out
    assert "link north>east" in out
    assert main(["plan", str(K_CASES / "kv_throughput.yaml")]) == 0
    out = capsys.readouterr().out
    assert "512 GPUs" in out
    assert "under 100" in out
    assert main(["plan", str(K_CASES / "kv_throughput.yaml"), "--json"]) == 0
    published = json.loads(capsys.readouterr().out)["published"]
    assert all(0.9 < row["ratio"] < 1.03 for row in published)


def test_figures_are_written_where_asked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", str(K_CASES / "kv_throughput.yaml"), "--json", "--figures", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert str(tmp_path / "kv_throughput.png") in err
    assert (tmp_path / "kv_throughput.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([K_CASE, "--prefill", "8"], "--prefill: found 8; must lie between 0 and 7"),
        ([K_CASE, "--threshold", "-1"], "--threshold: found -1"),
        ([K_CASE, "--egress-gbps", "nan"], "--egress-gbps: found nan"),
        ([K_CASE, "--egress-gbps", "inf"], "--egress-gbps: found inf; must be finite"),
        ([K_CASE, "--threshold", "inf"], "--threshold: found inf; must be finite"),
        ([K_CASE, "--slo-ttft-s", "3"], "go together"),
        ([K_CASE, "--slo-quantile", "0.5"], "--slo-quantile goes with --slo-ttft-s"),
        (
            [K_CASE, "--slo-ttft-s", "6", "--slo-rate-rps", "1e20"],
            "--slo-rate-rps: found 1e+20; must be above",
        ),
        (["/", "--json"], "/: can't be read: Is a directory"),
        ([K_CASE, "--slo-ttft-s", "1", "--slo-rate-rps", "3"], "--slo-ttft-s: no number of instances"),
        ([K_CASE, "--slo-ttft-s", "-1", "--slo-rate-rps", "3"], "--slo-ttft-s: found -1"),
        ([K_CASE, "--slo-ttft-s", "1", "--slo-rate-rps", "3", "--slo-quantile", "2"], "--slo-quantile"),
        ([str(K_CASES / "three_sites.yaml"), "--prefill", "3"], "doesn't go with a case of several clusters"),
        ([str(K_CASES / "kv_throughput.yaml"), "--threshold", "3"], "doesn't go with a case of a table"),
        (["/nowhere/case.yaml"], "no such file"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert problem in err
    assert err.count("\n") == 1


def test_an_empty_trace_and_an_impossible_slo_in_the_file_name_their_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "conversation_trace.jsonl").write_text("")
    arguments = ["plan", str(K_CASES / "conversation_trace.yaml"), "--topologies", str(tmp_path)]
    assert main(arguments) == 2
    assert "conversation_trace.jsonl: the file: found 'no request'" in capsys.readouterr().err
    case = tmp_path / "case.yaml"
    shutil.copy(K_CASE, case)
    with case.open("a") as file:
        file.write("slo: {rate_rps: 3, ttft_s: 1}\n")
    assert main(["plan", str(case)]) == 2
    assert "slo.ttft_s: found 1.0; no number of instances" in capsys.readouterr().err


def test_traces_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(K_CASES / "conversation_trace.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["throughput_rps"] > 0
