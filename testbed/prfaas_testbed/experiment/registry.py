"""Where metrics are registered: by name, with what each is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prfaas_testbed.experiment.view import View


class Unsupported(Exception):
    """The rows can't answer; the message says why."""


@dataclass(frozen=True)
class Metric:
    name: str
    unit: str
    description: str
    compute: Callable[[View], float]
    needs: tuple[str, ...] = ()
    """Fields of an experiment of which it must have one, or there is nothing to compute it from."""


K_METRICS: dict[str, Metric] = {}


def metric(
    name: str, unit: str = "", needs: tuple[str, ...] = ()
) -> Callable[[Callable[[View], float]], Callable[[View], float]]:
    """Register a metric; its docstring is its description. Refuses a second one of the same name."""

    def add(function: Callable[[View], float]) -> Callable[[View], float]:
        if name in K_METRICS:
            raise ValueError(f"metric {name} is registered twice")
        description = " ".join((function.__doc__ or "").split())
        K_METRICS[name] = Metric(name, unit, description, function, needs)
        return function

    return add
