from __future__ import annotations

from pathlib import Path

import pytest

from prfaas.config.experiment import find_file
from prfaas.config.places import checkout
from prfaas.model.errors import UsageError


def test_files_are_the_checkouts() -> None:
    assert (checkout() / "topologies" / "networks" / "two-sites.yaml").is_file()


def test_installed_without_a_checkout_they_are_where_the_command_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkout(tmp_path / "lib") == tmp_path


def test_a_name_that_nothing_has_is_answered_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"known: none in {tmp_path}"):
        find_file("one-t", tmp_path, "experiment")
