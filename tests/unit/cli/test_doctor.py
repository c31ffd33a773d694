"""What `doctor` makes of a machine's facts, and that each fault comes with its command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from prfaas.cli._facts import Facts, SglangFacts, TcpLimits
from prfaas.cli._findings import Finding, buffers, congestion, idle, judge, lines
from prfaas.cli.main import main

GOOD_TCP = TcpLimits(
    rmem_max_bytes=64 << 20,
    wmem_max_bytes=64 << 20,
    tcp_rmem_max_bytes=64 << 20,
    tcp_wmem_max_bytes=64 << 20,
    congestion_available=("reno", "cubic", "bbr"),
    congestion_allowed=("reno", "cubic", "bbr"),
    congestion_default="cubic",
    slow_start_after_idle=False,
)
GOOD = Facts(
    python=(3, 11, 7),
    kernel="6.1.0",
    root=True,
    cores=8,
    memory_bytes=64 << 30,
    disk_free_bytes=100_000_000_000,
    disk_path="/srv",
    shared_memory_free_bytes=8 << 30,
    open_files=65536,
    crc32c_in_hardware=True,
    testbed_installed=True,
    native_netem=True,
    uml_program=False,
    uml_modules=False,
    programs={"tc": True, "iperf3": True},
    tcp=GOOD_TCP,
    sglang=SglangFacts("python3", "0.5.23", True, "0.5.23"),
)


def named(facts: Facts, name: str) -> Finding:
    (found,) = [one for one in judge(facts, rate_mbps=1000, rtt_ms=40) if one.name == name]
    return found


def test_a_good_machine_has_nothing_to_mend() -> None:
    findings = judge(GOOD, rate_mbps=1000, rtt_ms=40)
    assert {finding.state for finding in findings} == {"ok"}
    assert not any(finding.remedy for finding in findings)


@pytest.mark.parametrize(
    ("change", "name", "state", "remedy"),
    [
        ({"python": (3, 10, 0)}, "python", "lacking", "3.11"),
        ({"cores": 1}, "cores", "warn", "2 or more"),
        ({"memory_bytes": 4 << 30}, "memory", "warn", "8 GiB"),
        ({"disk_free_bytes": 10**9}, "disk", "warn", "free 15 GB"),
        ({"shared_memory_free_bytes": 64 << 20}, "shm", "warn", "remount,size="),
        ({"open_files": 1024}, "open files", "warn", "ulimit -n 65536"),
        ({"crc32c_in_hardware": False}, "crc32c", "warn", "SSE 4.2"),
        ({"root": False}, "root", "lacking", "root"),
        (
            {"native_netem": False},
            "netem",
            "lacking",
            "apt-get install --no-install-recommends user-mode-linux",
        ),
        ({"native_netem": None}, "netem", "warn", "user-mode-linux"),
        ({"programs": {"mnexec": False, "tc": True}}, "programs", "lacking", "apt-get install .* mininet"),
        ({"sglang": SglangFacts("p", None, False, "0.5.23")}, "sglang", "warn", "pip install sglang==0.5.23"),
        ({"sglang": SglangFacts("p", "0.6", True, "0.5.23")}, "sglang", "warn", "pip install sglang==0.5.23"),
        ({"sglang": SglangFacts("p", "0.5.23", False, None)}, "plugin", "lacking", "pip install prfaas"),
    ],
)
def test_each_fault_is_found_and_comes_with_what_mends_it(
    change: dict[str, object], name: str, state: str, remedy: str
) -> None:
    import re

    found = named(dataclasses.replace(GOOD, **change), name)  # type: ignore[arg-type]
    assert found.state == state
    assert re.search(remedy, found.remedy)


def test_the_appliance_stands_in_for_a_kernel_without_netem() -> None:
    facts = dataclasses.replace(GOOD, native_netem=False, uml_program=True, uml_modules=True)
    found = named(facts, "netem")
    assert found.state == "ok"
    assert "appliance" in found.detail


def test_without_the_testbed_its_needs_are_not_judged() -> None:
    names = {
        one.name for one in judge(dataclasses.replace(GOOD, testbed_installed=False), rate_mbps=1, rtt_ms=1)
    }
    assert not names & {"root", "netem", "programs"}


def test_buffers_below_the_links_product_name_the_exact_sysctl() -> None:
    # 1000 Mbit/s x 150 ms = 18.75 MB in flight; twice that over four streams is 9.4 MB, the next power of two
    # 16 MiB.
    tcp = dataclasses.replace(GOOD_TCP, tcp_wmem_max_bytes=4 << 20)
    rmem, wmem = buffers(tcp, rate_mbps=1000, rtt_ms=150)
    assert rmem.state == "ok"
    assert wmem.state == "warn"
    assert "takes 9 streams" in wmem.detail
    assert wmem.remedy == 'sysctl -w net.ipv4.tcp_wmem="4096 65536 16777216"'


def test_congestion_control_that_only_root_may_use_names_the_list_to_set() -> None:
    tcp = dataclasses.replace(GOOD_TCP, congestion_allowed=("reno", "cubic"))
    bbr, cubic = congestion(tcp)
    assert bbr.remedy == 'sysctl -w net.ipv4.tcp_allowed_congestion_control="reno cubic bbr"'
    assert cubic.state == "ok"
    missing, _ = congestion(dataclasses.replace(tcp, congestion_available=("reno", "cubic")))
    assert missing.remedy.startswith("modprobe tcp_bbr && ")


def test_a_kernel_that_forgets_a_rested_link_is_told_how_not_to() -> None:
    found = idle(dataclasses.replace(GOOD_TCP, slow_start_after_idle=True))
    assert (found.state, found.remedy) == ("warn", "sysctl -w net.ipv4.tcp_slow_start_after_idle=0")


def test_lines_are_one_a_finding_and_aligned() -> None:
    text = lines([Finding("a", "ok", "fine"), Finding("longer", "lacking", "gone", "do this")])
    assert text.splitlines() == ["ok      a       fine", "lacking longer  gone | do this"]


def test_the_command_answers_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert status == (0 if said["fit"] else 3)
    assert {"python", "cores", "tcp_wmem", "bbr", "sglang"} <= {row["name"] for row in said["findings"]}


@pytest.mark.parametrize("value", ["0", "nan", "inf", "1e20"])
@pytest.mark.parametrize("name", ["--rate-mbps", "--rtt-ms"])
def test_an_impossible_link_is_bad_usage(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", name, value]) == 2
    assert f"{name}: found" in capsys.readouterr().err


def test_an_interpreter_that_is_none_is_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("")
    for path in (tmp_path / "text", tmp_path / "nowhere", tmp_path):
        assert main(["doctor", "--sglang-python", str(path)]) == 2
        assert f"--sglang-python {path}: no program" in capsys.readouterr().err
