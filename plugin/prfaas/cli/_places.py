"""Where results are to go: looked at before the work that makes them."""

from __future__ import annotations

import os
from pathlib import Path

from prfaas.model.errors import UsageError


def folder_for(option: str, folder: Path) -> Path:
    """The folder, made where it is missing. Raises UsageError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {folder}: no folder can be made there: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {folder}: nothing can be written there")
    return folder


def file_for(option: str, file: Path) -> Path:
    """The file, empty where it is new. Raises UsageError where it can't be written."""
    try:
        with file.open("a", encoding="utf-8"):
            return file
    except OSError as error:
        raise UsageError(f"{option} {file}: can't be written: {error.strerror}") from None
