"""Which prfaas this is, for whoever asks while sites are upgraded one at a time."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def _version() -> str:
    try:
        return version("prfaas")
    except PackageNotFoundError:  # run from a tree that isn't installed
        return "unknown"


K_PACKAGE_VERSION = _version()
