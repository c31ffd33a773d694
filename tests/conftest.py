"""Rules that hold for every test: what the fast run must not import, and what may be skipped."""

from __future__ import annotations

import os
import signal
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "here")

K_TIMEOUT_S = {"unit": 20, "loopback": 60, "network": 180, "sglang": 600, "gpu": 600}
K_TESTS = Path(__file__).parent


# A shell that starts a run in the background has it ignore Ctrl-C, and so would every program that tests
# start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class _Refuse(MetaPathFinder):
    """In the fast run an import of sglang, torch or mininet fails: that it needs none is tried, not hoped."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] in ("sglang", "torch", "mininet"):
            raise ImportError(f"{fullname} must not be imported by the fast tests")
        return None


if os.environ.get("PRFAAS_TEST_FAST"):
    sys.meta_path.insert(0, _Refuse())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        layer = item.path.relative_to(K_TESTS).parts[0]
        if layer in K_TIMEOUT_S and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(K_TIMEOUT_S[layer]))


def _allowed_skips() -> list[str]:
    lines = (K_TESTS / "allowed-skips.txt").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    """With CI=true a skip that tests/allowed-skips.txt doesn't list fails the run."""
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(item.nodeid.startswith(known) for known in _allowed_skips()):
            report.outcome = "failed"
            report.longrepr = f"skipped in CI, and tests/allowed-skips.txt doesn't list it: {reason}"
    return report
