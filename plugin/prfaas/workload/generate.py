"""A workload's configuration to timed requests: `timed_requests` is all that callers need.

Times, lengths and names draw from random numbers of their own, split off the one passed in: changing the
rate, a distribution or the tenants leaves the rest as it was. The same seed gives the same requests.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, takewhile
from random import Random

from prfaas.config.lengths import lengths_of
from prfaas.config.workload import Azure, Common, Mooncake, Sessions, SharedPrefix, Synthetic
from prfaas.model.lengths import Lengths
from prfaas.workload.arrivals import arrival_times
from prfaas.workload.requests import TimedRequest
from prfaas.workload.traces import parse_trace, play

Workload = Synthetic | Sessions | Mooncake | Azure


def timed_requests(config: Workload, rng: Random, lines: Sequence[str] = ()) -> Iterator[TimedRequest]:
    """Requests in order of arrival. `lines` are the trace's (config.workload.trace_lines), if it plays one.

    Lazy: a million requests need no list. Raises ConfigError for a trace that is wrong or empty.
    """
    match config:
        case Synthetic():
            requests = _synthetic(config, rng)
        case Sessions():
            requests = _sessions(config, rng)
        case Mooncake() | Azure():
            requests = _traced(config, rng, lines)
    if config.duration_s is not None:
        until_s = config.duration_s
        requests = takewhile(lambda request: request.arrival_s < until_s, requests)
    return islice(requests, config.requests)


class _Names:
    """Draws a tenant and an SLO class by weight."""

    def __init__(self, config: Common, rng: Random) -> None:
        self._rng = Random(rng.getrandbits(64))
        self._tenants, self._classes = _split(config.tenants), _split(config.classes)

    def draw(self) -> tuple[str, str]:
        return self._one(self._tenants), self._one(self._classes)

    def _one(self, choice: tuple[list[str], list[float]]) -> str:
        names, weights = choice
        return self._rng.choices(names, weights)[0] if names else ""


def _split(weights: Mapping[str, float]) -> tuple[list[str], list[float]]:
    return list(weights), list(weights.values())


class _Draw:
    """Whole lengths from a distribution."""

    def __init__(self, lengths: Lengths, rng: Random) -> None:
        self._lengths, self._rng = lengths, Random(rng.getrandbits(64))

    def __call__(self) -> int:
        return max(1, round(self._lengths.quantile(self._rng.random())))


class _Prefixes:
    """Which system prompt a request begins with, and the ids of the blocks it fills."""

    def __init__(self, config: SharedPrefix | None, block_tokens: int, rng: Random) -> None:
        self._config, self._rng = config, Random(rng.getrandbits(64))
        self.blocks = config.tokens // block_tokens if config else 0
        self.tokens = config.tokens if config else 0
        # Ids below this belong to system prompts; others count up from it.
        self.first_free_id = self.blocks * config.groups if config else 0

    def draw(self) -> tuple[int, ...]:
        """Ids of the prefix's whole blocks; none for a request without a shared prefix."""
        if self._config is None:
            return ()
        group, with_prefix = self._rng.randrange(self._config.groups), self._rng.random() < self._config.share
        return tuple(range(group * self.blocks, (group + 1) * self.blocks)) if with_prefix else ()


def _synthetic(config: Synthetic, rng: Random) -> Iterator[TimedRequest]:
    times = arrival_times(config.arrivals, Random(rng.getrandbits(64)))
    input_tokens = _Draw(lengths_of(config.input_tokens), rng)
    output_tokens = _Draw(lengths_of(config.output_tokens), rng)
    names = _Names(config, rng)
    prefixes = _Prefixes(config.shared_prefix, config.block_tokens, rng)
    next_id = prefixes.first_free_id
    for index, at_s in enumerate(times):
        tokens, (tenant, slo_class) = input_tokens(), names.draw()
        shared = prefixes.draw()
        ids: tuple[int, ...] = ()
        if shared:
            blocks = -(-tokens // config.block_tokens)
            own = max(0, blocks - len(shared))
            ids = (*shared[:blocks], *range(next_id, next_id + own))
            next_id += own
        yield TimedRequest(
            index,
            at_s,
            tokens,
            output_tokens(),
            block_ids=ids,
            block_tokens=config.block_tokens,
            tenant=tenant,
            slo_class=slo_class,
        )


def _sessions(config: Sessions, rng: Random) -> Iterator[TimedRequest]:
    starts = arrival_times(config.arrivals, Random(rng.getrandbits(64)))
    turns = _Draw(lengths_of(config.turns), rng)
    first, later = _Draw(lengths_of(config.first_tokens), rng), _Draw(lengths_of(config.turn_tokens), rng)
    output = _Draw(lengths_of(config.output_tokens), rng)
    think = Random(rng.getrandbits(64))
    names = _Names(config, rng)
    prefixes = _Prefixes(config.shared_prefix, config.block_tokens, rng)
    next_id = prefixes.first_free_id
    # (arrival, session, turn, request): turns not yet due. A session's ids are drawn when it starts, for all
    # its blocks, so that each turn's blocks begin with those of the turn before.
    waiting: list[tuple[float, int, int, TimedRequest]] = []
    index = 0

    def ready(before_s: float) -> Iterator[TimedRequest]:
        nonlocal index
        while waiting and waiting[0][0] <= before_s:
            at_s, session, turn, one = heapq.heappop(waiting)
            yield TimedRequest(
                index,
                at_s,
                one.prompt_tokens,
                one.output_tokens,
                one.block_ids,
                one.block_tokens,
                session,
                turn,
                one.tenant,
                one.slo_class,
            )
            index += 1

    for session, start_s in enumerate(islice(starts, config.sessions)):
        yield from ready(start_s)
        tenant, slo_class = names.draw()
        shared = prefixes.draw()
        at_s, tokens = start_s, (prefixes.tokens if shared else 0) + first()
        plan: list[tuple[float, int, int]] = []
        for turn in range(turns()):
            if tokens > config.max_tokens and turn:
                break
            tokens = min(tokens, config.max_tokens)
            answer = output()
            plan.append((at_s, tokens, answer))
            at_s += think.expovariate(1.0 / config.think_s)
            tokens += answer + later()
        blocks = -(-plan[-1][1] // config.block_tokens)
        own = max(0, blocks - len(shared))
        ids = (*shared[:blocks], *range(next_id, next_id + own))
        next_id += own
        for turn, (due_s, length, answer) in enumerate(plan):
            request = TimedRequest(
                0,
                due_s,
                length,
                answer,
                ids[: -(-length // config.block_tokens)],
                config.block_tokens,
                tenant=tenant,
                slo_class=slo_class,
            )
            heapq.heappush(waiting, (due_s, session, turn, request))
    yield from ready(math.inf)


def _traced(config: Mooncake | Azure, rng: Random, lines: Sequence[str]) -> Iterator[TimedRequest]:
    rows = parse_trace(config, lines)
    names = _Names(config, rng)
    played = play(config, rows, Random(rng.getrandbits(64)))
    others = None if config.arrivals is None else arrival_times(config.arrivals, Random(rng.getrandbits(64)))
    for index, row in enumerate(played):
        tenant, slo_class = names.draw()
        yield TimedRequest(
            index,
            row.at_s if others is None else next(others),
            row.input_tokens,
            row.output_tokens,
            row.block_ids,
            row.block_tokens,
            tenant=tenant,
            slo_class=slo_class,
        )
