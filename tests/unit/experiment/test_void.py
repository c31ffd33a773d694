"""A repetition that the emulator spoilt: again, kept, or too busy a machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prfaas.config.experiment import Experiment, load_experiment
from prfaas.config.topology import load_topology
from prfaas_testbed.experiment import runner as module
from prfaas_testbed.experiment.machine import K_TOPOLOGIES
from prfaas_testbed.experiment.runner import Attempt, Results, Runner, TooBusy


class Played(Runner):
    """Its attempts are those it was given; it notes what it kept."""

    found: list[Attempt]
    kept: list[tuple[int, Attempt]]

    def attempt(self, *args: Any, **kwargs: Any) -> Attempt:
        return self.found.pop(0)

    def keep(self, fleet: Any, found: Attempt, index: int) -> None:
        self.kept.append((index, found))


def played(spoilt: str, voids: list[str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    monkeypatch.setattr(module, "empty", lambda *args: None)
    hello = load_experiment("hello", K_TOPOLOGIES)
    assert isinstance(hello, Experiment)
    hello = hello.model_copy(update={"spoilt": spoilt})
    made = Played(hello, load_topology("hello"), tmp_path, Results(), lambda line: None, 0)
    made.found, made.kept = [Attempt([], [], [], void) for void in voids], []
    return made


def play(made: Played) -> None:
    fleet: Any = SimpleNamespace(model=SimpleNamespace(name="toy"))
    net: Any = None
    made.repetition(net, fleet, [], 4)


def test_it_is_run_again_and_the_spoilt_one_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = played("again", ["late", None], tmp_path, monkeypatch)
    play(made)
    assert [(index, found.void) for index, found in made.kept] == [(4, None)]
    assert len(made.results.void) == 1


def test_spoilt_each_time_the_machine_is_too_busy_and_nothing_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = played("again", ["late", "late", "later", None], tmp_path, monkeypatch)
    with pytest.raises(TooBusy, match="void each time: later"):
        play(made)
    assert made.kept == []
    assert len(made.results.void) == 3


def test_where_the_experiment_keeps_what_was_spoilt_it_counts_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = played("keep", ["late", None], tmp_path, monkeypatch)
    play(made)
    assert [(index, found.void) for index, found in made.kept] == [(4, "late")]
    assert made.results.void == []
