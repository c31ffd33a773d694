"""Where results are to go: looked at before the work that makes them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prfaas.model.errors import MachineError, UsageError


def place(text: str) -> Path:
    """The type of an option that names where results go. Raises argparse.ArgumentTypeError for nothing, which
    would be the folder that the command is called in (an unset variable's doing).
    """
    if not text:
        raise argparse.ArgumentTypeError("found nothing; name a folder or a file, or leave the option out")
    return Path(text)


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
    """The file, as it was. Raises UsageError where it can't be written."""
    new = not os.path.lexists(file)
    try:
        file.open("a", encoding="utf-8").close()
        if new:
            file.unlink()  # an empty one would look like a result
        return file
    except OSError as error:
        raise UsageError(f"{option} {file}: can't be written: {error.strerror}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Results, after the work. Raises MachineError, with the name, for what could not be known before."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"{error.filename or path}: can't be written: {error.strerror}") from None
