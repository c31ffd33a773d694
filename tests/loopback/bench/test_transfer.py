"""`prfaas bench transfer` over loopback: real pumps, a real object on standard output."""

from __future__ import annotations

import json

import pytest

from prfaas.cli.main import main


@pytest.mark.parametrize("tls", [[], ["--tls"]], ids=["plain", "tls"])
def test_it_prints_one_object_with_raw_figures(tls: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "bench",
        "transfer",
        "--loopback",
        "--total-bytes",
        "8000000",
        "--repetitions",
        "2",
        "--peers",
        "none",
    ]
    assert main([*argv, "--json", *tls]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    (row,) = found["rows"]
    assert row["engine"] == "prfaas"
    assert row["errors"] == []
    assert len(row["goodput_mbps"]) == 2
    assert all(figure > 0 for figure in row["goodput_mbps"])
    assert row["tls"] is bool(tls)
    for sample in row["samples"]:  # by the sockets, and not by what was asked for
        assert sample["streams_encrypted"] == (sample["streams_used"] if tls else 0)
    assert "prfaas" in said.err


@pytest.mark.parametrize("repetitions", ["0", "-1", "1000"])
def test_all_benches_are_asked_for_as_often_as_can_be(
    repetitions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "all", "--smoke", f"--repetitions={repetitions}"]) == 2
    assert capsys.readouterr().err == f"prfaas: repetitions: found {repetitions}; 1 to 100 are allowed\n"


@pytest.mark.parametrize("rate", ["nan", "inf", "-inf"])
def test_a_rate_that_is_no_number_is_bad_usage(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "transfer", f"--rate-mbps={rate}"]) == 2
    assert f"rate-mbps: found {rate}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ["--peers", "cake"],
        ["--loss", "x"],
        ["--repetitions", "0"],
        ["--cells", "nowhere"],
        ["--segment-bytes", "1"],
    ],
)
def test_bad_usage_is_told_before_anything_starts(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "transfer", *more]) == 2
    assert capsys.readouterr().out == ""
