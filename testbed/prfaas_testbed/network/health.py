"""Did the emulator itself spoil what was measured? Its timers' lag, its processor time, drops that nobody
planned.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prfaas_testbed.network.base import Emulation
    from prfaas_testbed.network.router import RouterAgent, Sample

K_LAG_P99_MS = 2.0
K_DROPS_PER_PACKET = 1e-5
K_SILENCE_S = 2.0  # without a sample for so long the emulator stood still, and its lag went unseen
K_FEWEST_LAGS = 20
K_LAGS_S = 4.0  # in which three times as many probes are sent
K_WAITING_BYTES = (
    100_000  # some 2 ms of work for the appliance: 40 full frames, as sockets count their memory
)


@dataclass(frozen=True)
class Health:
    """Of the time between a watch's start and its verdict."""

    seconds: float
    lag_p50_ms: float | None
    lag_p99_ms: float | None
    lag_max_ms: float | None
    lag_count: int
    cpu_share: float
    """Processors the emulation used, 1.0 being one whole core."""
    machine_load: float
    """Mean number of runnable processes of the last minute."""
    waiting_bytes: int
    """Median memory of packets that waited for the emulator itself."""
    packets: int
    """That left links."""
    unplanned_drops: dict[str, int]
    """By place; only those that happened."""
    reasons: list[str] = field(default_factory=list)

    @property
    def spoilt(self) -> bool:
        return bool(self.reasons)

    def as_row(self) -> dict[str, Any]:
        return {**asdict(self), "spoilt": self.spoilt}


class Watch:
    """Begins when made; `verdict()` may be asked several times."""

    def __init__(self, emulation: Emulation, agent: RouterAgent) -> None:
        self._emulation, self._agent = emulation, agent
        self._began_s = time.monotonic()
        self._cpu_s = emulation.cpu_s()
        self._accidents = self._all_accidents()
        self._packets = self._sent()

    def verdict(self) -> Health:
        ended_s = time.monotonic()
        samples = [s for s in tuple(self._agent.samples) if self._began_s <= s.at_s <= ended_s]
        before, after = self._accidents, self._all_accidents()
        cpu_s = self._emulation.cpu_s() - self._cpu_s
        return judge(
            seconds=ended_s - self._began_s,
            samples=samples,
            began_s=self._began_s,
            ended_s=ended_s,
            cpu_s=cpu_s,
            packets=self._sent() - self._packets,
            drops={name: count - before.get(name, 0) for name, count in after.items()},
        )

    def _all_accidents(self) -> dict[str, int]:
        seen = self._agent.samples[-1].accidents if self._agent.samples else {}
        return {**seen, **self._emulation.accidents()}

    def _sent(self) -> int:
        return (
            sum(row.packets for row in self._agent.samples[-1].links.values()) if self._agent.samples else 0
        )


def judge(
    *,
    seconds: float,
    samples: Sequence[Sample],
    began_s: float,
    ended_s: float,
    cpu_s: float,
    packets: int,
    drops: Mapping[str, int],
) -> Health:
    """Lag above 2 ms at p99 or hardly seen, unplanned drops above one in 100,000 packets, or silence: spoilt.
    Pure but for the machine's load, which is only told.
    """
    lags = sorted(lag for sample in samples for lag in sample.lags_ms)
    drops = {name: count for name, count in drops.items() if count > 0}
    reasons = []
    p99_ms = quantile(lags, 0.99)
    if len(lags) >= K_FEWEST_LAGS and p99_ms is not None and p99_ms > K_LAG_P99_MS:
        reasons.append(f"the emulator's timers lagged {p99_ms:.1f} ms at p99, above {K_LAG_P99_MS:g} ms")
    waiting = sorted(sample.waiting_bytes for sample in samples)
    waiting_bytes = waiting[len(waiting) // 2] if waiting else 0
    if waiting_bytes > K_WAITING_BYTES:
        reasons.append(
            f"packets queued before the emulator ({waiting_bytes} bytes at the median): too much load"
        )
    lost = sum(drops.values())
    if lost > max(0, packets) * K_DROPS_PER_PACKET:
        where = ", ".join(f"{name} {count}" for name, count in drops.items())
        reasons.append(f"{lost} unplanned drops in {packets} packets ({where})")
    if seconds >= K_LAGS_S and len(lags) < K_FEWEST_LAGS:
        reasons.append(f"only {len(lags)} lags of the emulator's timers were seen in {seconds:.1f} s")
    times = [began_s, *(sample.at_s for sample in samples), ended_s]
    silence_s = max(after - before for before, after in itertools.pairwise(times))
    if silence_s > K_SILENCE_S:
        reasons.append(f"the emulator sent no counters for {silence_s:.1f} s")
    return Health(
        seconds=round(seconds, 3),
        lag_p50_ms=quantile(lags, 0.5),
        lag_p99_ms=p99_ms,
        lag_max_ms=lags[-1] if lags else None,
        lag_count=len(lags),
        cpu_share=round(cpu_s / seconds, 3) if seconds > 0 else 0.0,
        machine_load=os.getloadavg()[0],
        waiting_bytes=waiting_bytes,
        packets=packets,
        unplanned_drops=drops,
        reasons=reasons,
    )


def quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None
