"""The search for the highest rate within an SLO; pure.

Rule: from a first rate, half as much again until a trial breaks the SLO (or a third less until one holds);
then the geometric middle between the highest that held and the lowest that broke, until their ratio is at
most `within`. The rate that held is then tried `confirm` times more with other arrivals; where the median of
all its trials doesn't hold, it counts as broken and the search goes on below. It ends at `least_rps` and
`most_rps` too: there the answer is a bound, and says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from prfaas.config.experiment import Capacity
from prfaas.config.run import RequestRow
from prfaas.config.workload import Azure, Mooncake, Sessions, Synthetic, WorkloadConfig
from prfaas.model.errors import UsageError

K_GROWTH = 1.5
K_RULE = (
    "x{growth:g} until the SLO share falls below {share:g}, then the geometric middle until the gap is at "
    "most {within:g}, then {confirm} more trials of what held, by their median"
)


@dataclass
class Search:
    """`next_rps` says what to try (None: done), `tell` what came of it."""

    first_rps: float
    choice: Capacity
    trials: list[tuple[float, float]] = field(default_factory=list)
    """(rate, SLO share), in order."""

    def _shares(self, rate: float) -> list[float]:
        return [share for tried, share in self.trials if tried == rate]

    def _holds(self, rate: float) -> bool:
        return statistics.median(self._shares(rate)) >= self.choice.slo_share

    @property
    def held_rps(self) -> float | None:
        """Highest rate that holds below the lowest that breaks."""
        broken = self.broken_rps
        held = [rate for rate, _ in self.trials if self._holds(rate) and (broken is None or rate < broken)]
        return max(held, default=None)

    @property
    def broken_rps(self) -> float | None:
        return min((rate for rate, _ in self.trials if not self._holds(rate)), default=None)

    def next_rps(self) -> float | None:
        held, broken = self.held_rps, self.broken_rps
        if held is None and broken is None:
            return self.first_rps
        if broken is None:
            assert held is not None
            return None if held >= self.choice.most_rps else min(self.choice.most_rps, held * K_GROWTH)
        if held is None:
            lower = max(self.choice.least_rps, broken / K_GROWTH)
            return None if broken <= self.choice.least_rps else lower
        if broken / held > self.choice.within:
            return float((held * broken) ** 0.5)
        return held if len(self._shares(held)) <= self.choice.confirm else None

    def tell(self, rate_rps: float, slo_share: float) -> None:
        self.trials.append((rate_rps, slo_share))

    def rule(self) -> str:
        choice = self.choice
        return K_RULE.format(
            growth=K_GROWTH, share=choice.slo_share, within=choice.within, confirm=choice.confirm
        )


def with_rate(workload: WorkloadConfig, rate_rps: float, duration_s: float) -> WorkloadConfig:
    """The workload at another mean rate, for so long; its shape and lengths stay. Raises UsageError where it
    has no rate."""
    now = rate_of(workload)
    factor = rate_rps / now
    if isinstance(workload, Synthetic | Sessions):
        rates = ("rate_rps", "on_rps", "off_rps", "mean_rps")
        changes = {
            name: getattr(workload.arrivals, name) * factor
            for name in rates
            if hasattr(workload.arrivals, name)
        }
        arrivals: Any = workload.arrivals.model_copy(update=changes)
        changed: dict[str, Any] = {"arrivals": arrivals, "requests": None, "duration_s": duration_s}
        return workload.model_copy(update=changed)
    return workload.model_copy(update={"rate_rps": rate_rps, "requests": None, "duration_s": duration_s})


def rate_of(workload: WorkloadConfig) -> float:
    """Its mean rate. Raises UsageError for a backlog and for a trace that plays at its own times."""
    if isinstance(workload, Mooncake | Azure):
        if workload.rate_rps is None:
            raise UsageError("a capacity search scales the rate: give the trace's workload rate_rps")
        return workload.rate_rps
    arrivals = workload.arrivals
    if arrivals.process == "at_once":
        raise UsageError("a capacity search scales the rate, and a backlog has none")
    if arrivals.process == "on_off":
        cycle_s = arrivals.on_s + arrivals.off_s
        return (arrivals.on_rps * arrivals.on_s + arrivals.off_rps * arrivals.off_s) / cycle_s
    return arrivals.mean_rps if arrivals.process == "diurnal" else arrivals.rate_rps


def slo_share(rows: Iterable[RequestRow], slo_ttft_s: float, model: str) -> float:
    """Share of a trial's requests whose first token came in time; 1 where there was none to serve."""
    mine = [row for row in rows if row.model == model]
    good = [row for row in mine if row.error is None and row.ttft_s is not None and row.ttft_s <= slo_ttft_s]
    return len(good) / len(mine) if mine else 1.0
