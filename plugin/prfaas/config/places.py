"""Where files named without a path are: this checkout, or the folder that a command is called in."""

from __future__ import annotations

from pathlib import Path


def checkout(installed: Path | None = None) -> Path:
    """The checkout that this code runs from; the current folder, where it was installed without one.
    `installed` is the folder that plugin/ would be in.
    """
    root = installed or Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").exists() else Path.cwd()
