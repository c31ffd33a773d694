"""What SGLang was asked for: the words of its command line, with those of the file that `--config` names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

K_FILE = "--config"


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """A flag's value as SGLang takes it: the last one counts, and the file's come first. None: not said."""
    found = None
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            found = argv[i + 1]
        elif word.startswith(f"{flag}="):
            found = word.removeprefix(f"{flag}=")
    if found is None and flag != K_FILE:
        found = _of_file(argv).get(_key(flag))
    return found


def says(argv: Sequence[str], flag: str) -> bool:
    """Whether a flag without a value is given."""
    return flag in argv or _of_file(argv).get(_key(flag)) == str(True)


def _of_file(argv: Sequence[str]) -> dict[str, str]:
    """Its settings. A file that SGLang can't read either says nothing here: SGLang says what is wrong."""
    path = value_of(argv, K_FILE)
    if path is None:
        return {}
    import yaml  # every process of SGLang's asks, and most have no such file

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {_key(str(name)): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _key(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
