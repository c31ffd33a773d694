"""The log of a process on stderr: one line an entry, whatever names and reasons from outside stand in it."""

from __future__ import annotations

import logging
import sys

K_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
_ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in K_CONTROLS}
"""Of what ends a line or steers a terminal: an entry that a peer makes up, or a colour, is neither."""


class OneLine(logging.Formatter):
    """Escapes control characters of messages. Tracebacks, which are ours, follow on lines of their own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).translate(_ESCAPES)


def log_to_stderr(form: str, level: int | str) -> None:
    """For a process that is only started once; does nothing where a log is set up already."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine(form))
    logging.basicConfig(level=level, handlers=[handler])
