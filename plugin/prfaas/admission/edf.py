"""Earliest deadline first on one link: can these bytes all be through in time?

For transfers whose bytes exist already, EDF meets every deadline exactly when, for each deadline D, the
bytes due by D fit between now and D. Bytes that prefill makes later are taken as K_PIECES equal pieces,
each existing from the end of its part of the interval (one piece when they come into being at one instant);
then the schedule itself is played (preemptive EDF
is optimal on one resource).
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter

K_PIECES = 4  # parts that bytes still being made are taken in
K_EPSILON_S = 1e-9  # s, rounding


@dataclass(slots=True)
class Promise:
    """Bytes of one transfer that are due by a deadline. The ledger changes it in place."""

    transfer: Hashable
    remaining_bytes: float
    deadline_s: float
    first_s: float
    """From here to ready_s its bytes come into being."""
    ready_s: float
    serial: int
    """Order of arrival: equal deadlines are served in it."""
    late: bool = False
    """Its first promise was broken.

    Deadline_s is the one it was given instead (inf while the link is down).
    """


def finish_times(promises: Iterable[Promise], rate_bps: float, now: float) -> dict[Hashable, float]:
    """When each transfer is through under preemptive EDF at a constant rate; inf for all at rate 0.

    Bytes are conserved, and the link never idles while bytes exist.
    """
    todo = sorted(promises, key=_order)
    if rate_bps <= 0:
        return {one.transfer: now if one.remaining_bytes <= 0 else float("inf") for one in todo}
    # Where what comes into being first is due first, and each at one instant, nothing is ever preempted and
    # each begins when it is there and the one before is through.
    done: dict[Hashable, float] = {}
    at_s = before_s = now
    for one in todo:
        ready_s = one.ready_s
        if ready_s > now:
            if one.first_s < ready_s or ready_s < before_s:
                return _play(todo, rate_bps, now)
            before_s = ready_s
            if ready_s > at_s:
                at_s = ready_s
        elif before_s > now:
            return _play(todo, rate_bps, now)
        at_s += one.remaining_bytes * 8 / rate_bps
        done[one.transfer] = at_s
    return done


def first_broken(promises: Iterable[Promise], rate_bps: float, now: float) -> Promise | None:
    """The promise with the earliest deadline that can't be kept at this rate; None when all can."""
    todo = sorted(promises, key=_order)
    done = finish_times(todo, rate_bps, now)
    for one in todo:
        if done[one.transfer] > one.deadline_s + K_EPSILON_S:
            return one
    return None


def to_give_up(promises: Iterable[Promise], rate_bps: float, now: float) -> list[Promise]:
    """Some that have to be given up, so that others are kept; none when all are (Moore and Hodgson: of those
    due by a deadline that fails, the largest). Ask again without them, until none is left to give up.

    Where all bytes are there already, one answer is all, and as few as possible. Where some come later, what
    is given up may save those behind it less than its own time, so that more have to follow.
    """
    todo = sorted(promises, key=_order)
    done = finish_times(todo, rate_bps, now)
    if rate_bps <= 0:
        return [one for one in todo if done[one.transfer] > one.deadline_s + K_EPSILON_S]
    due: list[tuple[float, int, Promise]] = []
    given_up: list[Promise] = []
    saved_s = 0.0
    for one in todo:
        heapq.heappush(due, (-one.remaining_bytes, -one.serial, one))
        while due and done[one.transfer] - saved_s > one.deadline_s + K_EPSILON_S:
            victim = heapq.heappop(due)[2]
            given_up.append(victim)
            saved_s += victim.remaining_bytes * 8 / rate_bps
            if victim is one:
                break
    return given_up


_order = attrgetter("deadline_s", "serial")


def _play(todo: list[Promise], rate_bps: float, now: float) -> dict[Hashable, float]:
    pieces: list[tuple[float, int, float]] = []  # (exists from, rank, seconds of the link)
    left = [0] * len(todo)
    for rank, one in enumerate(todo):
        seconds = one.remaining_bytes * 8 / rate_bps
        if one.ready_s <= now:
            pieces.append((now, rank, seconds))
            left[rank] = 1
            continue
        start_s = max(now, one.first_s)
        if start_s >= one.ready_s:  # all at one instant: pieces would be served one after the other anyway
            pieces.append((one.ready_s, rank, seconds))
            left[rank] = 1
            continue
        part_s = (one.ready_s - start_s) / K_PIECES
        pieces += [(start_s + part_s * (k + 1), rank, seconds / K_PIECES) for k in range(K_PIECES)]
        left[rank] = K_PIECES
    pieces.sort()
    done: dict[Hashable, float] = {}
    if all(before[1] <= after[1] for before, after in pairwise(pieces)):
        # What comes into being first is due first: nothing is ever preempted.
        at_s = now
        for exists_s, rank, seconds in pieces:
            at_s = max(at_s, exists_s) + seconds
            done[todo[rank].transfer] = at_s
        return done
    ready: list[tuple[int, float]] = []
    at_s, index = now, 0
    while index < len(pieces) or ready:
        if not ready:
            at_s = max(at_s, pieces[index][0])
        while index < len(pieces) and pieces[index][0] <= at_s:
            _, rank, seconds = pieces[index]
            heapq.heappush(ready, (rank, seconds))
            index += 1
        rank, seconds = heapq.heappop(ready)
        until_s = pieces[index][0] if index < len(pieces) else float("inf")
        if at_s + seconds > until_s:  # something else comes into being first, and may go before it
            heapq.heappush(ready, (rank, seconds - (until_s - at_s)))
            at_s = until_s
            continue
        at_s += seconds
        left[rank] -= 1
        if left[rank] == 0:
            done[todo[rank].transfer] = at_s
    return done
