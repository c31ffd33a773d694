"""The log of a process on stderr: one line an entry, whatever names and reasons from outside stand in it."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import sys

K_LOG_LEVELS = ("debug", "info", "warning", "error")
K_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
_ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in K_CONTROLS}
"""Of what ends a line or steers a terminal: an entry that a peer makes up, or a colour, is neither."""


class OneLine(logging.Formatter):
    """Escapes control characters of messages. Tracebacks, which are ours, follow on lines of their own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return in_one_line(super().formatMessage(record))


def in_one_line(text: str) -> str:
    """`text` with its control characters written out."""
    return text.translate(_ESCAPES)


class Burst:
    """Of like entries that come many at once the first is for the log, and their number for the one after
    them: a peer with 64 streams that goes, or a scanner, fills no disk. Clock-free.
    """

    def __init__(self, quiet_s: float) -> None:
        self._quiet_s = quiet_s
        self._until_s = float("-inf")
        self._left_out = 0

    def words(self, now: float) -> str | None:
        """What to end the entry with: how many were left out before it. None: leave this one out too, or tell
        it where everything is told.
        """
        if now < self._until_s:
            self._left_out += 1
            return None
        left_out, self._left_out = self._left_out, 0
        self._until_s = now + self._quiet_s
        return f" ({left_out} like it before)" if left_out else ""


def log_to_stderr(level: int | str) -> None:
    """For a process that is only started once; does nothing where a log is set up already. A crash of native
    code (SIGSEGV) says there too where it was: else a pump that comes again at once leaves no word of it.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    with contextlib.suppress(io.UnsupportedOperation):  # a stderr that is no file
        faulthandler.enable()
