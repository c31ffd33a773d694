"""How many requests of a known sequence any policy could serve within their deadlines: an upper bound.

A linear programme over bins of time. It knows all arrivals beforehand, may interrupt a prefill and go on at
any instance, may split one between paths, may serve a part of a request and count that part, may send bytes
before they exist, may let a request decode before it is prefilled, and needn't decode what comes too late:
everything a real policy can do is among that, so no policy does better, and the best one may do worse. Bins
round in its favour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Job:
    """One request, as its deadline sees it."""

    arrival_s: float
    deadline_s: float
    """When its first token is due."""
    local_s: float
    """Prefill on a local instance."""
    prfaas_s: float
    """Prefill on a PrfaaS instance; infinite where it may not go out."""
    kv_bytes: float
    """To send if it goes out."""
    tail_s: float = 0.0
    """From the end of an offloaded prefill to its first token, at the least: half a round trip."""
    decode_s: float = 0.0
    """How long it holds a decode slot, from its first token on."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What no policy exceeds."""

    requests: int
    within: float
    """At most so many in time; parts of requests are counted."""
    offloaded: float
    """Of those, prefilled by PrfaaS instances."""

    @property
    def share(self) -> float:
        return self.within / self.requests


@dataclass(frozen=True)
class Resources:
    """What there is to prefill and send with."""

    local_instances: int
    """N_p."""
    prfaas_instances: int
    """N_prfaas."""
    egress_bps: float
    decode_slots: int | None = None
    """N_d · BS_max; None: as many as it takes."""


class _Programme:
    """Variables and rows of the programme under construction."""

    def __init__(self) -> None:
        self.gain: list[float] = []
        self.most: list[float] = []
        self.limit: list[float] = []
        self.row: list[int] = []
        self.column: list[int] = []
        self.value: list[float] = []

    def variable(self, gain: float, most: float) -> int:
        self.gain.append(gain)
        self.most.append(most)
        return len(self.gain) - 1

    def new_row(self, limit: float) -> int:
        self.limit.append(limit)
        return len(self.limit) - 1

    def add(self, row: int, column: int, value: float) -> None:
        self.row.append(row)
        self.column.append(column)
        self.value.append(value)


def clairvoyant_bound(jobs: Sequence[Job], resources: Resources, bin_s: float = 1.0) -> Bound:
    """The most of `jobs` that can have their first token in time. Raises ValueError for none, or a bad bin.

    Three variables a job and bin: 3,000 jobs with ten seconds each take two seconds at bins of one.
    """
    # Here, not above: half a second and 60 MB that the planner's other users needn't pay.
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    if not jobs:
        raise ValueError("no request to bound")
    if not bin_s > 0:
        raise ValueError(f"bin_s {bin_s:g} must be above 0")
    start_s = min(job.arrival_s for job in jobs)
    bins = 1 + max(0, *(int((job.deadline_s - start_s) / bin_s) for job in jobs))
    programme = _Programme()
    local = [programme.new_row(resources.local_instances * bin_s) for _ in range(bins)]
    prfaas = [programme.new_row(resources.prfaas_instances * bin_s) for _ in range(bins)]
    # Megabytes, so that all rows are of like size.
    link = [programme.new_row(resources.egress_bps / 8e6 * bin_s) for _ in range(bins)]
    slots = resources.decode_slots
    decode = [] if slots is None else [programme.new_row(float(slots)) for _ in range(bins)]
    out_columns: list[int] = []
    for job in jobs:
        whole = programme.new_row(1.0)
        # What is prefilled joins a batch, at the latest when its first token is due.
        joined = programme.new_row(0.0) if decode else None
        if job.arrival_s + job.local_s <= job.deadline_s and resources.local_instances:
            for place, room_s in _bins(job.arrival_s, job.deadline_s, start_s, bin_s):
                column = programme.variable(1 / job.local_s, room_s)
                programme.add(whole, column, 1 / job.local_s)
                programme.add(local[place], column, 1.0)
                if joined is not None:
                    programme.add(joined, column, 1 / job.local_s)
        ready_s = job.deadline_s - job.tail_s
        if job.arrival_s + job.prfaas_s <= ready_s and resources.prfaas_instances:
            sent = programme.new_row(0.0)
            megabytes = job.kv_bytes / 1e6
            for place, room_s in _bins(job.arrival_s, ready_s, start_s, bin_s):
                column = programme.variable(1 / job.prfaas_s, room_s)
                out_columns.append(column)
                programme.add(whole, column, 1 / job.prfaas_s)
                programme.add(prfaas[place], column, 1.0)
                if joined is not None:
                    programme.add(joined, column, 1 / job.prfaas_s)
                programme.add(sent, column, megabytes / job.prfaas_s)
                carried = programme.variable(0.0, math.inf)
                programme.add(sent, carried, -1.0)
                programme.add(link[place], carried, 1.0)
        if joined is not None:
            for place, _ in _bins(job.arrival_s, job.deadline_s, start_s, bin_s):
                column = programme.variable(0.0, 1.0)
                programme.add(joined, column, -1.0)
                # Of the bins, those that it surely holds from end to end, wherever in `place` it joined.
                for held in range(place + 1, min(bins, place + int(job.decode_s / bin_s))):
                    programme.add(decode[held], column, 1.0)
    if not programme.gain:
        return Bound(len(jobs), 0.0, 0.0)
    matrix = csr_array(
        (programme.value, (programme.row, programme.column)),
        shape=(len(programme.limit), len(programme.gain)),
    )
    found = linprog(
        -np.array(programme.gain),
        A_ub=matrix,
        b_ub=programme.limit,
        bounds=np.column_stack([np.zeros(len(programme.most)), programme.most]),
        method="highs",
    )
    if not found.success:
        raise ValueError(f"the bound wasn't found: {found.message}")
    gain = np.array(programme.gain)
    out = float((gain[out_columns] * found.x[out_columns]).sum()) if out_columns else 0.0
    return Bound(len(jobs), float(-found.fun), out)


def _bins(from_s: float, to_s: float, start_s: float, bin_s: float) -> Iterable[tuple[int, float]]:
    """Bins between two times, each with the seconds of it that lie between."""
    first, last = int((from_s - start_s) / bin_s), int((to_s - start_s) / bin_s)
    for place in range(first, last + 1):
        begin_s = start_s + place * bin_s
        room_s = min(to_s, begin_s + bin_s) - max(from_s, begin_s)
        if room_s > 0:
            yield place, room_s
