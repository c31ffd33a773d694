"""A pump's life: found or started by servers, its page, its end."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from datetime import UTC
from importlib.metadata import version
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from prfaas.config.pump import PumpConfig, split_address
from prfaas.model.errors import MachineError
from prfaas.model.observations import LinkObservation
from prfaas.model.transfer import FailureReason, TransferKind
from prfaas.pump import keys
from prfaas.pump.server import Pump
from prfaas.pump_client import LocalPumpClient, launch

from_start = {"idle_exit_s": 0.5}


def gone(pid: int) -> bool:
    """Whether nothing is left of it: a zombie is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_servers_that_find_no_pump_start_one_between_them_and_it_ends_after_them(pumps):
    config = pumps.config("auto", **from_start)
    first = pumps.client(config, start=True)
    second = pumps.client(config, start=True)
    assert first.pump_pid == second.pump_pid != os.getpid()
    mode = stat.S_IMODE(config.control_path.stat().st_mode)
    assert mode & 0o077 == 0
    pid = first.pump_pid
    first.close()
    time.sleep(1.0)
    assert not gone(pid), "it ended although a server was attached"
    second.close()
    end = time.monotonic() + 20
    while not gone(pid):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not config.control_path.exists()


def test_a_pump_that_cannot_start_says_why(pumps, tmp_path):
    config = pumps.config("west", listen="192.0.2.1:5000", allow_plaintext=True)
    with pytest.raises(MachineError, match="listen"):
        LocalPumpClient.open(config)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(MachineError, match="no pump answers"):
        LocalPumpClient.open(pumps.config("nobody"), start=False)
    assert os.listdir("/proc/self/fd") == before, "who has none stays, and may try again and again"


def test_servers_of_a_pump_that_is_a_service_wait_for_it_and_start_none_in_its_place(pumps):
    config = pumps.config("west", started_by="operator")
    opened = []
    waiting = threading.Thread(target=lambda: opened.append(pumps.client(config, start=True)))
    waiting.start()
    time.sleep(0.5)
    assert not opened
    pumps.start("west", started_by="operator")
    waiting.join(20)
    (client,) = opened
    assert client.pump_pid == pumps.pid("west")
    pumps.kill("west")
    time.sleep(1.5)  # long enough for another to be started
    assert not Path(f"{config.control_path}.log").exists(), "a server started one"
    pumps.start("west", started_by="operator")
    pumps.until(lambda: client.pump_pid == pumps.pid("west"))
    assert client.stats()["clients"] == 1


def test_a_pump_that_is_a_service_and_is_not_there_is_told_as_such(pumps, monkeypatch):
    monkeypatch.setattr(launch, "K_START_S", 0.3)
    with pytest.raises(MachineError, match=r"nobody.sock: no pump answers; by `started_by: operator`"):
        LocalPumpClient.open(pumps.config("nobody", started_by="operator"))


def test_a_second_pump_at_the_same_control_socket_is_refused(pumps):
    pumps.start("west")
    second = subprocess.run(
        [sys.executable, "-m", "prfaas.pump", "--config", str(pumps.folder / "west.yaml")],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert second.returncode == 3
    assert "another pump is at work" in second.stderr


def test_a_pump_that_ends_late_leaves_another_pumps_control_socket_alone(pumps):
    config = pumps.start("west")
    os.unlink(config.control_path)
    with contextlib.closing(Pump(config)) as other:
        os.kill(pumps.pid("west"), signal.SIGTERM)
        pumps.until(lambda: gone(pumps.pid("west")))
        assert "the pump ends: 0 transfers out and 0 in" in pumps.log("west")
        assert stat.S_ISSOCK(other.config.control_path.stat().st_mode)
    assert not config.control_path.exists()


def test_the_page_shows_peers_streams_links_and_refusals_as_prometheus_wants_them(
    pumps, metric_faults, tmp_path
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    link = {"peer_site": "west", "admission": {"nominal_bps": 1e9}}
    for site in ("east", "west"):
        keys.create_site(tmp_path / site, site, days=9, authority_days=99, now=datetime.datetime.now(UTC))
    tls = {"site_file": tmp_path / "east/site.pem", "authorities": [tmp_path / "west/authority.crt"]}
    east = pumps.client(pumps.start("east", metrics=f"127.0.0.1:{port}", links=[link], tls=tls))
    tls = {"site_file": tmp_path / "west/site.pem", "authorities": [tmp_path / "east/authority.crt"]}
    west = pumps.client(pumps.start("west", tls=tls))
    src, dst = pumps.memory(east, 1 << 20), pumps.memory(west, 1 << 20, fill=0)
    lease = west.grant_lease(1, 0, [(dst.ctypes.data, len(dst))], 30)
    sent = east.submit(
        lease.grant,
        [src.ctypes.data],
        [dst.ctypes.data],
        [len(src)],
        kind=TransferKind.KV,
        deadline_s=20,
        last=True,
    )
    assert sent.wait(20).ok

    def get(path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
            body: bytes = response.read()
            return body

    page = get("/metrics").decode()
    assert metric_faults(page) == []
    families = {f.name: f for f in text_string_to_metric_families(page)}
    payload = families["prfaas_pump_peer_payload_bytes_sent"].samples
    assert [(s.labels["site"], s.value) for s in payload] == [("west", len(src))]
    assert families["prfaas_pump_transfers_ended"].samples[0].value == 1
    assert families["prfaas_pump_stream_rtt_seconds"].samples
    (about,) = families["prfaas_pump_info"].samples
    assert about.labels["version"] == version("prfaas")
    assert families["process_start_time_seconds"].samples
    assert families["prfaas_link_estimate_rate_bps"].samples[0].labels == {"link": "east>west"}
    ends = families["prfaas_pump_certificate_expiry_timestamp_seconds"].samples
    days = {(s.labels["site"], s.labels["kind"]): (s.value - time.time()) / 86400 for s in ends}
    assert days == pytest.approx({("east", "certificate"): 9, ("west", "authority"): 99}, abs=0.1)
    assert json.loads(get("/links"))[0]["link"] == "east>west"
    assert json.loads(get("/stats"))["site"] == "east"
    with pytest.raises(urllib.error.HTTPError):
        get("/nothing")


def test_a_hang_up_which_tools_send_for_a_reload_ends_no_pump(pumps):
    config = pumps.start("west")
    os.kill(pumps.pid("west"), signal.SIGHUP)
    time.sleep(0.3)
    assert pumps.client(config).stats()["site"] == "west"


def test_the_log_tells_once_that_a_peer_cannot_be_reached_and_once_that_it_is_back(pumps):
    east = pumps.client(pumps.start("east"))
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    east.prepare(address)
    pumps.until(lambda: "not connected" in pumps.log("east"))
    west = pumps.start("west", listen=address)
    pumps.until(lambda: "connected, after" in pumps.log("east"))
    lines = [line.partition("prfaas.pump.dialling: ")[2] for line in pumps.log("east").splitlines()]
    told = [line for line in lines if line.startswith(f"peer {address}: ")]
    assert len(told) == 2, told
    assert "Connection refused" in told[0]
    assert west.site == "west"


def test_many_strangers_are_a_line_that_names_an_address(pumps):
    config = pumps.start("west", listen="127.0.0.1:0")
    host, port = split_address(pumps.client(config).address)
    for _ in range(20):
        with socket.create_connection((host, port)) as one:
            one.sendall(b"GET / HTTP/1.1\r\n\r\n" * 8)
            with contextlib.suppress(ConnectionError):
                one.recv(1)
    pumps.until(lambda: pumps.client(config).stats()["inbound"]["refusals"].get("handshake") == 20)
    told = [line for line in pumps.log("west").splitlines() if "an unknown peer at 127.0.0.1" in line]
    assert 1 <= len(told) <= 3, told


def test_a_peer_that_went_for_good_is_forgotten_and_one_that_answers_is_not(pumps, tmp_path):
    west = pumps.start("west")
    there = pumps.client(west).address
    pump = Pump(pumps.config("east"))
    try:
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            gone = f"127.0.0.1:{free.getsockname()[1]}"
        for address in (gone, there):
            pump.peer(address, pump.loop.now()).prepare(pump.loop.now())

        def addresses():
            return {peer["address"] for peer in pump.stats(pump.loop.now())["peers"]}

        end = time.monotonic() + 30
        backoff = pump.peer(gone, pump.loop.now())._dialling._backoff
        while not backoff.failures:
            assert time.monotonic() < end
            pump.loop.turn(0.05)
        backoff.failures = 10  # and on
        assert addresses() == {gone, there}
        for peer in pump._peers.values():
            peer._used_s -= 100  # as if it were that much later
        for _ in range(40):
            pump.loop.turn(0.05)
            if addresses() == {there}:
                break
        assert addresses() == {there}
        assert pump.peer(there, pump.loop.now()).n_ready
    finally:
        pump.close()


def test_a_peer_by_which_a_link_that_is_down_is_probed_is_not_forgotten(pumps):
    link = {"peer_site": "west", "admission": {"nominal_bps": 1e9, "probe_every_s": 300.0}}
    pump = Pump(PumpConfig.model_validate({**pumps.config("east").model_dump(), "links": [link]}))
    try:
        estimator, now = pump.desks["west"].host.estimator, pump.loop.now()
        for address, site in (("127.0.0.1:9", "west"), ("127.0.0.1:10", "north")):
            pump.peer(address, now).wanted_site = site
            pump.peer(address, now)._used_s -= 1000
        waiting = {"delivered_bytes": 0, "backlog_bytes": 1 << 20, "interval_s": 0.1, "sender": "p"}
        estimator.on_observation(LinkObservation(link=estimator.link, at_s=now, **waiting))
        estimator.on_timer(now + 60)
        pump._tick(now)
        assert set(pump._peers) == {"127.0.0.1:9"}
        estimator.on_observation(
            LinkObservation(link=estimator.link, at_s=now + 61, **{**waiting, "delivered_bytes": 1})
        )
        pump._tick(now)
        assert not pump._peers
    finally:
        pump.close()


def test_an_address_that_is_none_costs_the_server_that_prepares_for_it_nothing(pumps):
    east = pumps.client(pumps.start("east"))
    pid = east.pump_pid
    east.prepare("nowhere")
    assert east.stats()["clients"] == 1
    assert "no peer to be ready for" in pumps.log("east")
    assert east.pump_pid == pid


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "\u00e9" * 70], ids=["empty", "long", "wide"])
def test_an_address_that_can_be_no_name_fails_its_own_transfer_and_the_pump_lives(pumps, host):
    east, west = pumps.client(pumps.start("east", allow_plaintext=True)), pumps.client(pumps.start("west"))
    pid, address = east.pump_pid, f"{host}:7700"
    src, dst = pumps.memory(east, 64), pumps.memory(west, 64, fill=0)
    places = [src.ctypes.data], [dst.ctypes.data], [64]
    lease = west.grant_lease(1, 0, [(dst.ctypes.data, 64)], 30)
    lost = dataclasses.replace(lease.grant, address=address)
    east.prepare(address)
    outcome = east.submit(lost, *places, kind=TransferKind.KV, deadline_s=0.5).wait(20)
    assert outcome.reason is FailureReason.DEADLINE
    assert is_ended(east.forward(address, "127.0.0.1", 1))
    assert east.submit(lease.grant, *places, kind=TransferKind.KV, deadline_s=20).wait(20).ok
    errors = {peer["address"]: peer["last_error"] for peer in east.stats()["peers"]}
    assert "can't be a name" in errors[address]
    assert east.pump_pid == pid


def is_ended(address: str) -> bool:
    """Whether a connection to it is ended without a byte."""
    try:
        with socket.create_connection(split_address(address), timeout=20) as sock:
            return not sock.recv(1)
    except ConnectionError:
        return True


def test_a_pump_takes_as_many_descriptors_as_it_may_have():
    code = (
        "import resource as r; from prfaas.pump.__main__ import _take_descriptors as take; "
        "most = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (256, most)); take(); "
        "assert r.getrlimit(r.RLIMIT_NOFILE) == (most, most) != (256, most)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
