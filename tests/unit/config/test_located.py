"""Relative paths of a file are taken from its folder."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from prfaas.config.loading import Strict
from prfaas.config.located import FileName, FilePath, located


class Inner(Strict):
    key: FileName | None = None
    word: str = "as/it/is"


class Outer(Strict):
    one: FilePath
    many: tuple[FilePath, ...] = ()
    inner: Inner = Inner()
    listed: tuple[Inner, ...] = ()
    named: dict[str, Inner] = Field(default_factory=dict)
    maybe: Inner | None = None


def test_paths_wherever_they_stand_become_absolute_and_nothing_else_does(tmp_path: Path) -> None:
    config = Outer.model_validate(
        {
            "one": "a.pem",
            "many": ["b.crt", "/elsewhere/c.crt"],
            "inner": {"key": "sub/k"},
            "listed": [{"key": "l"}, {}],
            "named": {"x": {"key": "n"}},
        }
    )
    found = located(config, tmp_path / "f.yaml")
    assert found.one == tmp_path / "a.pem"
    assert found.many == (tmp_path / "b.crt", Path("/elsewhere/c.crt"))
    assert found.inner == Inner(key=str(tmp_path / "sub/k"))
    assert found.listed == (Inner(key=str(tmp_path / "l")), Inner())
    assert found.named == {"x": Inner(key=str(tmp_path / "n"))}
    assert found.maybe is None
    assert config.one == Path("a.pem"), "the former one is as it was"


def test_which_fields_were_given_is_still_known(tmp_path: Path) -> None:
    found = located(Outer.model_validate({"one": "a", "inner": {"key": "k"}}), tmp_path / "f.yaml")
    assert found.model_fields_set == {"one", "inner"}
    assert found.inner.model_fields_set == {"key"}
