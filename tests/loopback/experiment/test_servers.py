"""A program of ours in a site: when it counts as ready."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prfaas_testbed.experiment.servers import Program

K_PATIENCE_S = 20.0
K_MODULE = """
import pathlib, sys, time
while not pathlib.Path("go").exists():
    time.sleep(0.02)
print("it is ready", flush=True)
time.sleep(60)
"""


def test_a_program_is_ready_by_its_own_word_not_by_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text(K_MODULE)
    log = tmp_path / "slow.log"
    log.write_text("it is ready\n")  # of a run that was interrupted
    site: Any = SimpleNamespace(popen=subprocess.Popen)
    program = Program("slow", site, "slow", tmp_path / "none", log, "it is ready")
    for _ in range(2):  # the second time it was killed and is started again
        (tmp_path / "go").unlink(missing_ok=True)
        program.start()
        waiting = threading.Thread(target=program.wait_ready, args=(lambda line: None,))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        (tmp_path / "go").touch()
        waiting.join(K_PATIENCE_S)
        assert not waiting.is_alive()
        program.kill()
    program.stop()
    assert log.read_text().count("it is ready") == 3
