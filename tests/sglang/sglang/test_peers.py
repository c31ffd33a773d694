"""SGLang's own disaggregation cases take minutes each; that they can still be run is seen here."""

from __future__ import annotations

import subprocess
import sys

from prfaas_testbed.instances.sglang_server import K_CHECKOUT


def test_each_of_sglangs_own_cases_can_be_run_against_the_backend() -> None:
    done = subprocess.run(
        [sys.executable, str(K_CHECKOUT / "scripts" / "peers" / "run.py"), "--smoke"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 of 9 of SGLang's cases can be run" in done.stdout
