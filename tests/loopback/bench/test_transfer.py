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
