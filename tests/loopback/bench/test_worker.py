"""Processes of the bench: answers, failures, silence and ends."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prfaas_testbed.bench.places import Loopback
from prfaas_testbed.bench.worker import Worker, WorkerError

MODULE = """
import sys
print("a library says hello as it loads")
def fail(): raise ValueError("no such page")
def leave(): sys.exit(3)
def handlers():
    print("and again")
    return {"add": lambda a, b: a + b, "fail": fail, "leave": leave}
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    (tmp_path / "some_worker.py").write_text(MODULE)
    spawn = functools.partial(Loopback(tmp_path).popen, "sender")
    path = ":".join([str(tmp_path), *sys.path])
    with Worker("some worker", spawn, "some_worker", tmp_path / "log", PYTHONPATH=path) as made:
        yield made


def test_it_answers_whatever_libraries_print(worker: Worker) -> None:
    assert worker.call("add", a=2, b=3) == 5
    assert worker.call("add", a=4, b=5) == 9


def test_a_failure_is_told_and_the_next_question_answered(worker: Worker) -> None:
    with pytest.raises(WorkerError) as failed:
        worker.call("fail")
    assert str(failed.value) == "some worker failed: ValueError: no such page"
    assert worker.call("add", a=1, b=1) == 2


def test_silence_and_an_early_end_are_told(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="gave no answer within"):
        worker.receive(0.05)
    with pytest.raises(WorkerError, match="some worker ended"):
        worker.call("leave")
