"""One small network, up for the whole file: what a site is, and what a link can do."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prfaas.config.places import checkout
from prfaas.config.topology import LinkChange, Topology
from prfaas.model.errors import MachineError, UsageError
from prfaas_testbed.network import Network, open_network, verdict
from prfaas_testbed.network.hosts import K_PIN_PREFIX
from prfaas_testbed.network.network import K_WAN
from prfaas_testbed.network.realtime import K_SCHED_DEADLINE
from prfaas_testbed.network.router import RouterError
from prfaas_testbed.network.state import in_namespace
from prfaas_testbed.network.traffic import Kind

K_STOPPED_S = 0.4


@pytest.fixture(scope="module")
def net(small: Topology, wait_s: float, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with open_network(small, tmp_path_factory.mktemp("net"), wait_s=wait_s) as network:
        yield network


def said(net: Network, site: str, *argv: str) -> str:
    done = net.sites[site].popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out, _ = done.communicate(timeout=60)
    return str(out)


def rtt_ms(net: Network) -> float:
    target = net.sites["west"].address
    times = re.findall(r"time=([\d.]+)", said(net, "east", "ping", "-n", "-c", "9", "-i", "0.1", target))
    return sorted(map(float, times))[len(times) // 2]


def guests() -> list[int]:
    """The appliance's kernel and its processes."""
    return [
        pid
        for pid in in_namespace(K_PIN_PREFIX + K_WAN)
        if Path(f"/proc/{pid}/cmdline").read_text().startswith("linux.uml")
    ]


def test_calibration_finds_the_network_as_it_was_asked_for(net: Network) -> None:
    rows = net.calibrate()
    assert verdict(rows) == []
    assert {row.direction for row in rows} == {"east->west", "west->east"}
    there = next(row for row in rows if row.direction == "east->west" and row.inside)
    assert there.wanted_rtt_ms == 25
    assert there.packets >= 2000
    back = next(row for row in rows if row.direction == "west->east" and row.inside)
    assert back.measured_burst is not None


def test_the_guest_has_a_processor_s_time_reserved_and_its_processes_real_time_priority(net: Network) -> None:
    if net.emulation != "appliance":
        pytest.skip("native: the kernel's own netem needs no process")
    net.prepare_changes(["west->east"])
    policies = [os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK for pid in guests()]
    assert policies.count(K_SCHED_DEADLINE) == 1
    assert policies.count(os.SCHED_FIFO) == len(policies) - 1, policies
    assert net.does_without == {}


def longest_frame(file: Path) -> int:
    data, at, longest = file.read_bytes(), 24, 0
    while at + 16 <= len(data):
        _, _, kept, whole = struct.unpack_from("=IIII", data, at)
        at, longest = at + 16 + kept, max(longest, whole)
    return longest


def test_frames_may_be_handed_over_in_groups_but_are_never_merged(net: Network) -> None:
    west, there, here = net.sites["west"], net.workdir / "there.pcap", net.workdir / "here.pcap"

    def received_bytes() -> int:
        return int(said(net, "west", "cat", f"/sys/class/net/{west.device}/statistics/rx_bytes"))

    before_bytes = received_bytes()
    with net.capture("east", here):
        arriving = west.popen(
            ["tcpdump", "-n", "-p", "-i", west.device, "-s", "96", "-Z", "root", "-w", there]
        )
        traffic = net.cross_traffic("east", "west", "cubic", streams=8)
        # Not for so many seconds: its connections' first packets may be among those that the link loses.
        give_up_s = time.monotonic() + 20
        while received_bytes() < before_bytes + 2_000_000 and time.monotonic() < give_up_s:
            time.sleep(0.1)
        traffic.stop()
        arriving.terminate()
        arriving.wait(10)
    assert longest_frame(here) == longest_frame(there) == 1514


def test_the_guest_gets_no_copy_of_what_it_need_not_see(net: Network) -> None:
    if net.emulation != "appliance":
        pytest.skip("native: no guest")
    said(net, "east", "ping", "-q", "-c", "20", "-i", "0.01", net.sites["west"].address)
    pids = in_namespace(K_PIN_PREFIX + K_WAN)
    table = Path(f"/proc/{pids[0]}/net/packet").read_text()
    sending = [row.split() for row in table.splitlines()[1:] if row.split()[3] == "0800"]
    assert len(sending) == 2
    assert [row[6] for row in sending] == ["0", "0"], "memory of frames that nobody reads"


def test_a_site_has_one_address_and_no_way_out_but_the_wan(net: Network) -> None:
    routes = said(net, "east", "ip", "-o", "route").splitlines()
    assert [line.split()[0] for line in routes] == ["default", "10.77.1.0/24"]
    assert all("east-wan" in line for line in routes)
    assert "unreachable" in said(net, "east", "sh", "-c", "ping -c 1 -W 1 1.1.1.1 2>&1").lower()


def test_a_site_can_t_open_another_s_sockets_or_shared_memory(net: Network) -> None:
    places = ["/tmp", "/run", "/dev/shm"]
    serve = (
        "import socket, sys, time\n"
        "for place in sys.argv[1:]:\n"
        "    s = globals()[place] = socket.socket(socket.AF_UNIX)\n"
        "    s.bind(f'{place}/control.sock'); s.listen()\n"
        "    open(f'{place}/secret', 'w').write('x')\n"
        "s = socket.socket(socket.AF_UNIX); s.bind('\\0abstract'); s.listen()\n"
        "sys.stdout.write('ready\\n'); sys.stdout.flush(); time.sleep(60)\n"
    )
    attack = (
        "import os, socket, sys\n"
        "def tried(address):\n"
        "    s = socket.socket(socket.AF_UNIX)\n"
        "    try: s.connect(address)\n"
        "    except OSError: return False\n"
        "    finally: s.close()\n"
        "    return True\n"
        "for place in sys.argv[1:]:\n"
        "    print(place, tried(f'{place}/control.sock'), os.path.exists(f'{place}/secret'))\n"
        "print('abstract', tried('\\0abstract'))\n"
    )
    server = net.sites["east"].popen(
        [sys.executable, "-c", serve, *places], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout.readline() == "ready\n"
        own = said(net, "east", sys.executable, "-c", attack, *places).splitlines()
        other = said(net, "west", sys.executable, "-c", attack, *places).splitlines()
        assert own == [*(f"{place} True True" for place in places), "abstract True"]
        assert other == [*(f"{place} False False" for place in places), "abstract False"]
        assert not Path("/tmp/control.sock").exists()
    finally:
        server.kill()
        server.communicate()


def test_sites_share_the_checkout_and_the_work_folder(net: Network) -> None:
    note = net.workdir / "note"
    said(net, "west", "sh", "-c", f"echo from west > {note}")
    assert note.read_text() == "from west\n"
    assert said(net, "east", "cat", str(note)) == "from west\n"
    assert said(net, "east", "pwd").strip() == str(checkout())


def test_a_run_may_be_started_where_its_sites_see_nothing(
    net: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said(net, "east", "ls", "-d", str(tmp_path)).endswith("No such file or directory\n")
    assert net.sites["east"].check(["echo", "here"]) == "here\n"


def test_a_program_runs_under_its_own_id_and_a_missing_one_raises(net: Network) -> None:
    process = net.sites["east"].popen(["sleep", "60"])
    deadline = time.monotonic() + 20
    while (command := Path(f"/proc/{process.pid}/cmdline").read_bytes()) != b"sleep\x0060\0":
        assert time.monotonic() < deadline, command
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -9
    with pytest.raises(MachineError, match="east can't start no-such-program"):
        net.sites["east"].popen(["no-such-program"])


def test_a_step_in_latency_is_felt_and_its_time_is_told(net: Network) -> None:
    before = rtt_ms(net)
    applied = net.apply("east->west", LinkChange(delay_ms=75))
    try:
        assert 50 < rtt_ms(net) - before < 90
        assert 0 <= applied.at_s - applied.asked_s < 0.5
        assert applied.state.delay_ms == 75
    finally:
        net.apply("east->west", LinkChange(delay_ms=15))
    assert abs(rtt_ms(net) - before) < 10


def test_a_link_goes_down_in_one_direction_and_comes_up_again(net: Network) -> None:
    address = net.sites["west"].address
    net.apply("east->west", LinkChange(down=True))
    try:
        assert "100% packet loss" in said(
            net, "east", "ping", "-n", "-c", "3", "-i", "0.1", "-W", "1", address
        )
    finally:
        net.apply("east->west", LinkChange(down=False))
    assert "100% packet loss" not in said(net, "east", "ping", "-n", "-c", "9", "-i", "0.1", address)


def test_every_kind_of_trouble_is_taken_and_read_back(net: Network) -> None:
    before = net.links["west->east"]
    trouble = {
        "rate_mbps": 5,
        "delay_ms": 30,
        "jitter_ms": 3,
        "loss_percent": 2,
        "corrupt_percent": 1,
        "duplicate_percent": 1,
        "reorder_percent": 5,
        "queue_bytes": 90_000,
    }
    applied = net.apply("west->east", LinkChange.model_validate(trouble))
    assert applied.state == net.links["west->east"]
    back = {name: getattr(before, name) for name in trouble if name not in ("loss_percent", "queue_bytes")}
    net.apply("west->east", LinkChange.model_validate({**back, "bursty_loss": before.bursty_loss}))
    net.check_links()


def test_changes_that_were_prepared_are_taken_and_one_that_was_not_shows_when_links_are_checked(
    net: Network,
) -> None:
    net.prepare_changes(["east->west"])
    for delay_ms in (20, 25, 15, 20, 15):
        net.apply("east->west", LinkChange(delay_ms=delay_ms), read_back=False)
    net.check_links()
    place = net.plan.links["east->west"]
    found = net.agent.run(place.node, ["tc", "-s", "-j", "qdisc", "show", "dev", place.device])
    handle = next(row["handle"] for row in json.loads(found) if row["kind"] == "netem")
    line = ["tc", "qdisc", "change", "dev", place.device, "handle", handle, "root", "netem", "delay", "30ms"]
    net.agent.run(place.node, line)
    try:
        with pytest.raises(RouterError, match="east->west is not as asked for"):
            net.check_links()
    finally:
        net.apply("east->west", LinkChange(delay_ms=15))


def test_a_change_that_the_router_cannot_make_is_told_and_the_next_is_made(net: Network) -> None:
    node = net.plan.links["east->west"].node
    for _ in range(2):
        with pytest.raises(RouterError, match='Cannot find device "none"'):
            net.agent.change(node, ["qdisc change dev none root netem delay 1ms", "qdisc show dev lo"])
        net.apply("east->west", LinkChange(delay_ms=15))


def test_an_unknown_link_names_those_there_are(net: Network) -> None:
    with pytest.raises(UsageError, match="east->west, west->east"):
        net.apply("east->south", LinkChange(delay_ms=1))


def test_wan_bytes_are_the_receiver_s_frames_split_by_port(net: Network) -> None:
    net.count_ports({"engine": [5001], "control": [5002]})
    before = net.sample().links["west->east"].bytes
    payload = 300_000
    serve = (
        "import socket, sys\n"
        "a, b = socket.create_server(('', 5001)), socket.create_server(('', 5002))\n"
        "sys.stdout.write('ready\\n'); sys.stdout.flush()\n"
        "for s in (a, b):\n"
        "    c, _ = s.accept()\n"
        "    while c.recv(65536): pass\n"
        "    c.close()\n"
    )
    send = (
        "import socket, sys\n"
        "for port, size in ((5001, int(sys.argv[2])), (5002, 1000)):\n"
        "    s = socket.create_connection((sys.argv[1], port))\n"
        "    s.sendall(bytes(size)); s.shutdown(1); s.recv(1)\n"
    )
    server = net.sites["east"].popen([sys.executable, "-c", serve], stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "ready\n"
    assert said(net, "west", sys.executable, "-c", send, net.sites["east"].address, str(payload)) == ""
    server.communicate(timeout=30)
    time.sleep(0.4)  # the counters come every 0.1 s
    counts = net.port_bytes("east")
    assert counts["engine"].received_bytes > payload
    assert 1000 < counts["control"].received_bytes < 10_000
    assert counts["other"].received_bytes == 0
    total = sum(count.received_frame_bytes for count in counts.values())
    assert net.sample().links["west->east"].bytes - before == total


def test_cutting_resets_one_connection_and_leaves_its_neighbour(net: Network) -> None:
    serve = (
        "import socket, sys, threading\n"
        "def echo(c):\n"
        "    try:\n"
        "        while data := c.recv(100): c.sendall(data)\n"
        "    except OSError: pass\n"
        "s = socket.create_server(('', 5003)); sys.stdout.write('ready\\n'); sys.stdout.flush()\n"
        "while True: threading.Thread(target=echo, args=(s.accept()[0],), daemon=True).start()\n"
    )
    talk = (
        "import socket, sys\n"
        "two = [socket.create_connection((sys.argv[1], 5003)) for _ in range(2)]\n"
        "sys.stdout.write('ready\\n'); sys.stdout.flush()\n"
        "sys.stdin.readline()\n"
        "for s in two:\n"
        "    s.settimeout(20)\n"
        "    try:\n"
        "        s.sendall(b'x'); print('alive' if s.recv(1) else 'closed')\n"
        "    except ConnectionError: print('cut')\n"
    )
    server = net.sites["west"].popen([sys.executable, "-c", serve], stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "ready\n"
    client = net.sites["east"].popen(
        [sys.executable, "-c", talk, net.sites["west"].address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert client.stdout.readline() == "ready\n"
        victim = net.cut("east", 5003)
        assert victim is not None
        out, _ = client.communicate("go\n", timeout=60)
        assert sorted(out.split()) == ["alive", "cut"]
        assert net.cut("east", 5999) is None
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize("kind", ["udp", "cubic"])
def test_cross_traffic_arrives_until_it_is_stopped(net: Network, kind: Kind) -> None:
    before = net.sample().links["east->west"].bytes
    traffic = net.cross_traffic("east", "west", kind, rate_mbps=5 if kind == "udp" else None)
    time.sleep(1.5)  # iperf3 has no report of less
    give_up_s = time.monotonic() + 20
    while net.sample().links["east->west"].bytes - before < 50_000 and time.monotonic() < give_up_s:
        time.sleep(0.1)
    found = traffic.stop()
    assert found["error"] is None
    assert net.sample().links["east->west"].bytes - before > 50_000


def test_the_watch_has_figures_for_the_time_it_watched(net: Network) -> None:
    watch = net.watch()
    rtt_ms(net)
    health = watch.verdict()
    assert health.lag_count > 5
    assert health.packets >= 9
    assert health.cpu_share > 0
    assert json.dumps(health.as_row())


def test_a_stop_of_the_whole_router_is_lag_and_what_holds_up_only_its_agent_is_none(net: Network) -> None:
    if net.emulation != "appliance":
        pytest.skip("native: a kernel that stands still stops this test as well")
    guest = next(pid for pid in guests() if os.sched_getscheduler(pid) & K_SCHED_DEADLINE == K_SCHED_DEADLINE)

    def stop_the_guest() -> None:
        os.kill(guest, signal.SIGSTOP)
        time.sleep(K_STOPPED_S)
        state = Path(f"/proc/{guest}/stat").read_text().rpartition(")")[2].split()[0]
        os.kill(guest, signal.SIGCONT)
        assert state == "T", "it didn't stand still"

    seen: list[tuple[float, tuple[float, ...]]] = []

    def lags_ms(hold_up: Callable[[], object]) -> list[float]:
        time.sleep(0.3)
        began_s = time.monotonic()
        hold_up()
        time.sleep(1.5)
        # The stop may have come in the middle of a sample, which then tells of it under the time before.
        samples = net.samples(began_s - 0.15, time.monotonic())
        seen[:] = [(round(sample.at_s - began_s, 3), sample.lags_ms) for sample in samples]
        return [lag for sample in samples for lag in sample.lags_ms]

    agent_only = lags_ms(lambda: net.agent.run(None, ["sleep", str(K_STOPPED_S)]))
    assert len(agent_only) > 20, str(seen)  # due while it stood still as well
    assert sum(lag > 100 for lag in agent_only) == 0, str(seen)
    whole = lags_ms(stop_the_guest)
    assert len(whole) > 20, str(seen)
    assert 2 < sum(lag > 100 for lag in whole) < 9, str(seen)  # those due in its first 0.3 s
    # The first that is due may be so up to 90 ms after it stopped.
    assert max(whole) > 0.7 * K_STOPPED_S * 1000


def test_a_capture_at_the_wan_holds_the_packets(net: Network) -> None:
    file = net.workdir / "wan.pcap"
    with net.capture("west", file) as captured:
        rtt_ms(net)
    assert file.stat().st_size > 24 + 9 * 2 * (16 + 64)
    assert not captured.ended_early
    assert captured.missed == 0


def test_a_capture_that_is_full_says_so(net: Network) -> None:
    with net.capture("west", net.workdir / "full.pcap", most_packets=3) as captured:
        rtt_ms(net)
    assert captured.ended_early


def test_a_second_network_says_who_holds_the_machine(net: Network, small: Topology, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="topology small"), open_network(small, tmp_path):
        pass
    command = [Path(sys.executable).with_name("prfaas-testbed"), "calibrate", "hello"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "another testbed run holds this machine's network" in done.stderr
    assert done.stderr.count("\n") == 1
    net.check_links()
