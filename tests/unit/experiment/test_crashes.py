"""A program that crashed is found by what its log says, whoever had started it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prfaas.model.errors import PrfaasError
from prfaas_testbed.experiment.crashes import crash_in, require_none

K_SAID = """2026-01-01 INFO prfaas.pump.server: pump of site east at 10.0.0.1:7600
Fatal Python error: Segmentation fault

Current thread 0x00007efded090b80 (most recent call first):
  Garbage-collecting
  File "plugin/prfaas/pump/loop.py", line 78 in turn
  File "plugin/prfaas/pump/loop.py", line 63 in run
"""
K_TOLD = 'Segmentation fault, File "plugin/prfaas/pump/loop.py", line 78 in turn'


def fleet_of(folder: Path, said: str | None) -> Any:
    """One site, whose servers' own pump left `said`."""

    def run(argv: list[str]) -> Any:
        assert argv == ["cat", "/run/prfaas-east.sock.log"]
        return SimpleNamespace(returncode=said is None, stdout=said or "")

    net = SimpleNamespace(sites={"east": SimpleNamespace(run=run)})
    return SimpleNamespace(
        folder=folder, pumps={"east": None}, net=net, control_socket=lambda name: f"/run/prfaas-{name}.sock"
    )


def test_a_crash_is_told_with_its_innermost_place() -> None:
    assert crash_in(K_SAID) == K_TOLD
    assert crash_in("Fatal Python error: Aborted\n") == "Aborted, nowhere that it names"
    assert crash_in("all is well\n") is None


def test_logs_without_one_pass_and_a_server_s_own_pump_needs_none(tmp_path: Path) -> None:
    (tmp_path / "decode.log").write_bytes(b"all is \xff well\n")
    require_none(fleet_of(tmp_path, None))
    require_none(fleet_of(tmp_path, "all is well\n"))


def test_a_crash_ends_the_run_whoever_had_started_the_program(tmp_path: Path) -> None:
    with pytest.raises(PrfaasError, match=f"a pump that a server of east started crashed: {K_TOLD}"):
        require_none(fleet_of(tmp_path, K_SAID))
    (tmp_path / "pump-east.log").write_text(K_SAID)
    with pytest.raises(PrfaasError, match=f"pump-east crashed: {K_TOLD}; log: "):
        require_none(fleet_of(tmp_path, None))
