"""A core of its own for what is to be measured undisturbed by the rest of the same machine.

On real hardware prefill computes on an accelerator, and the network's work is done by other cores and other
machines. Here all of them share a few cores, and a transfer takes from the prefill that it runs beside what
it would never take from a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Self

import psutil

from prfaas.model.errors import PrfaasError


class OwnCore:
    """The first core of this process, to be kept free for one process. Use as a context manager: afterwards
    this process may use all its cores again.
    """

    def __enter__(self) -> Self:
        self._all = os.sched_getaffinity(0)
        return self

    def __exit__(self, *_: object) -> None:
        _pin(_threads(os.getpid()), self._all)

    def give(self, pid: int) -> int | None:
        """It is `pid`'s from now on, for all its threads; all else that this process has started, and itself,
        have the others. The core; None, and nothing is changed, where there is only one.

        What is started later inherits from who starts it, so that it stays off that core.
        """
        own, *others = sorted(self._all)
        if not others:
            return None
        us = psutil.Process()
        for one in (us.pid, *(child.pid for child in us.children(recursive=True))):
            _pin(_threads(one), others)
        _pin(_threads(pid), [own])
        return own


def scheduler_of(pid: int) -> int:
    """The process of an SGLang server in which the model runs. Raises PrfaasError."""
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any("::scheduler" in word for word in (child.name(), *child.cmdline()[:1])):
                return child.pid
    raise PrfaasError(f"no scheduler among the processes of {pid}")


def _threads(pid: int) -> list[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    return []


def _pin(threads: Iterable[int], cores: Iterable[int]) -> None:
    for thread in threads:
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, cores)
