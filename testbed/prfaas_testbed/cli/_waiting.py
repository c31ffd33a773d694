"""--wait, as every command has it that takes the machine's network."""

from __future__ import annotations

import argparse

K_MOST_S = 86_400.0


def add_wait(parser: argparse.ArgumentParser) -> None:
    """`wait_s`: how long to wait for another run to end."""
    parser.add_argument(
        "--wait", "--wait-s", dest="wait_s", metavar="S", type=_seconds, default=0.0,
        help="wait so long for another run to end (default: don't)",
    )  # fmt: skip


def _seconds(text: str) -> float:
    """Raises argparse.ArgumentTypeError, which argparse tells with the option's name."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= K_MOST_S:
        raise argparse.ArgumentTypeError(f"found {text!r}; 0 to {K_MOST_S:g} seconds are allowed")
    return found
