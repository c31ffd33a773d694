"""`prfaas check` against a real pump: a fit way, and each way to be unfit."""

from __future__ import annotations

import datetime
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prfaas.cli._link import Rate
from prfaas.cli.check import judge_rates
from prfaas.cli.main import main
from prfaas.config.pump import PumpConfig, TlsConfig
from prfaas.pump import keys
from prfaas.pump_client.launch import connect


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A pump of west that trusts east; its address, and the folder of everybody's keys."""
    folder = tmp_path_factory.mktemp("check")
    now = datetime.datetime.now(datetime.UTC)
    for site in ("east", "west", "north"):
        keys.create_site(folder / site, site, days=30, authority_days=60, now=now)
    keys.trust(folder / "west", folder / "east" / "authority.crt")
    for site in ("east", "north"):
        keys.trust(folder / site, folder / "west" / "authority.crt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    west = folder / "west"
    config = PumpConfig(
        site="west",
        listen=f"127.0.0.1:{port}",
        control_socket=folder / "west.sock",
        tls=TlsConfig(site_file=west / "site.pem", authorities=(west / "trusted.crt",)),
    )
    file = folder / "west.yaml"
    file.write_text(config.model_dump_json(exclude_none=True))
    with open(folder / "west.log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "prfaas.pump", "--config", str(file)], stderr=log)
    try:
        for _ in range(1000):
            sock = connect(config.control_path)
            if sock is not None:
                sock.close()
                break
            time.sleep(0.02)
        yield f"127.0.0.1:{port}", folder
    finally:
        process.terminate()
        process.wait()


def check(address: str, *more: str) -> list[str]:
    return ["check", "--peer", address, "--streams", "1,2", *more]


def test_a_fit_way_is_measured_by_streams_and_congestion_control(
    peer: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    address, folder = peer
    assert main(check(address, "--keys", str(folder / "east"), "--peer-site", "west", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fit"]
    assert {rate["streams"] for rate in found["rates"]} == {1, 2}
    assert all(rate["goodput_bps"] > 0 for rate in found["rates"])
    names = {finding["name"] for finding in found["findings"]}
    assert {"our key", "reach", "peer", "rtt", "loss", "rate", "tcp_wmem"} <= names


def test_a_private_key_that_others_may_read_is_told(
    peer: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    address, folder = peer
    (folder / "east" / "site.pem").chmod(0o640)
    try:
        main(["check", "--peer", address, "--keys", str(folder / "east"), "--streams", "1"])
    finally:
        (folder / "east" / "site.pem").chmod(0o600)
    assert f"chmod 600 {folder / 'east' / 'site.pem'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("site", "more", "says"),
    [
        ("east", ["--peer-site", "north"], "not valid for 'north.site.prfaas'"),
        ("north", ["--peer-site", "west"], "connected, then|TLS:"),
        ("", [], "connected, then"),
    ],
    ids=["another site", "not trusted there", "no certificate"],
)
def test_a_way_without_trust_is_unfit(
    site: str, more: list[str], says: str, peer: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    address, folder = peer
    ours = ["--keys", str(folder / site)] if site else []
    assert main(check(address, *ours, *more)) == 1
    assert re.search(says, capsys.readouterr().out)


def test_a_port_that_speaks_no_tls_is_said_to_be_none_of_a_pump_with_it(
    peer: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert main(check(f"127.0.0.1:{other.getsockname()[1]}", "--keys", str(peer[1] / "west"))) == 1
        thread.join()
    assert "is this the pump's port, and has that pump `tls:`?" in capsys.readouterr().out


def test_nobody_there_is_unfit(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and never listening
        assert main(check(f"127.0.0.1:{taken.getsockname()[1]}")) == 1
    assert "can't be reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    [
        ["--peer", "nonsense"],
        ["--peer", "192.0.2.1:1"],
        ["--peer", "127.0.0.1:1", "--streams", "0"],
        ["--peer", "127.0.0.1:1", "--rate-mbps", "nan"],
        ["--peer", "127.0.0.1:1", "--rate-mbps=-1"],
    ],
)
def test_bad_usage_is_told(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *more]) == 2
    assert capsys.readouterr().err


def test_the_fewest_streams_that_are_enough_are_named_and_a_shortfall_is_lacking() -> None:
    rates = [Rate(1, "cubic", 50e6, 0.01), Rate(16, "cubic", 190e6, 0.02), Rate(1, "bbr", 185e6, 0.01)]
    loss, rate = judge_rates(rates, None)[-2:]
    assert loss.state == "warn"
    assert "bbr with 1 stream is enough" in rate.detail
    assert judge_rates(rates, 500.0)[-1].state == "lacking"
