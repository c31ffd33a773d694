"""The log of a pump or a router: an entry is a line."""

from __future__ import annotations

import io
import logging
import signal
import subprocess
import sys

import pytest

from prfaas.telemetry.log_lines import Burst, OneLine, log_to_stderr


def written(message: str, *args: object, error: BaseException | None = None) -> str:
    info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("prfaas.pump", logging.WARNING, "f.py", 1, message, args, info)
    return OneLine("%(levelname)s %(name)s: %(message)s").format(record)


@pytest.mark.parametrize(
    "end", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\x1b[2K"]
)
def test_a_name_from_outside_makes_no_entry_of_its_own(end: str) -> None:
    line = written("site %s: %s", "east", f"gone{end}ERROR prfaas.pump: all is lost")
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert line.startswith("WARNING prfaas.pump: site east: gone\\")


def test_letters_of_any_language_stay() -> None:
    assert written("modèle 模型 — ok") == "WARNING prfaas.pump: modèle 模型 — ok"


def test_a_traceback_keeps_its_lines() -> None:
    with pytest.raises(ValueError, match="why") as caught:
        raise ValueError("why")
    assert written("a fault", error=caught.value).splitlines()[-1] == "ValueError: why"


def test_of_like_entries_that_come_at_once_the_first_is_told_and_the_number_of_the_others_later() -> None:
    burst = Burst(quiet_s=5.0)
    assert [burst.words(now) for now in (0.0, 0.1, 4.9)] == ["", None, None]
    assert burst.words(5.0) == " (2 like it before)"
    assert burst.words(60.0) == ""


def test_what_comes_seldom_is_told_whole() -> None:
    burst = Burst(quiet_s=5.0)
    assert [burst.words(10.0 * n) for n in range(3)] == ["", "", ""]


def test_a_crash_of_native_code_leaves_where_it_was() -> None:
    script = (
        "import os, signal; from prfaas.telemetry.log_lines import log_to_stderr\n"
        "def inside(): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "log_to_stderr('INFO'); inside()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr
    assert "in inside" in done.stderr


def test_a_stderr_that_is_no_file_is_logged_to_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    log_to_stderr("INFO")
