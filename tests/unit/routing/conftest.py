"""The 1T case as a fluid of two pools and a link: arrivals, prefill, transfer; no decode limit.

Not the simulator: it knows only what a steady-state claim needs, and runs 10,000 requests in a second.
"""

from __future__ import annotations

import heapq
import math
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from types import ModuleType

import pytest
import yaml

from prfaas.config.policy import PolicyConfig
from prfaas.model.decisions import Action, Decision
from prfaas.model.ids import LinkId
from prfaas.model.observations import LinkEstimate, RequestView, SiteObservation, Snapshot
from prfaas.model.profiles import Curve, Profile
from prfaas.routing import Fleet, Policy, create_policy

CASE = Path(__file__).parents[3] / "topologies" / "cases" / "case_1t_hybrid.yaml"
LINK = LinkId("east", "west")


def profiles() -> tuple[Profile, Profile]:
    """(local, prfaas) instances of the 1T case."""
    case = yaml.safe_load(CASE.read_text())
    away, local = case["prfaas"]["profile"], case["local"]["profile"]
    kv = Curve.of(away["tokens"], [mib * (1 << 20) for mib in away["kv_mib"]], "kv")
    return (
        Profile("local", Curve.of(local["tokens"], local["prefill_s"], "prefill_s"), kv),
        Profile("prfaas", Curve.of(away["tokens"], away["prefill_s"], "prefill_s"), kv),
    )


def lengths(rng: random.Random, count: int) -> list[int]:
    """Truncated log-normal by renormalising: mu 9.90, sigma 1.00, 128 to 131,072."""
    normal = NormalDist(9.90, 1.00)
    low, high = normal.cdf(math.log(128)), normal.cdf(math.log(131072))
    return [round(math.exp(normal.inv_cdf(low + rng.random() * (high - low)))) for _ in range(count)]


@dataclass
class Job:
    name: str
    tokens: int
    arrived_s: float
    slo_s: float
    decision: Decision | None = None
    done_s: float | None = None
    prefilled: bool = False
    left_bits: float = 0.0
    asked: int = 0
    shed: bool = False


@dataclass
class Pool:
    """Instances of one site behind one queue; served in order of arrival, or by deadline."""

    free: int
    profile: Profile
    by_deadline: bool = False
    queue: list[tuple[float, int, Job]] = field(default_factory=list)
    ends: dict[str, float] = field(default_factory=dict)
    queued_s: float = 0.0
    size: int = 0

    def __post_init__(self) -> None:
        self.size = self.free

    def backlog_s(self, now: float) -> float:
        return self.queued_s + sum(end - now for end in self.ends.values())


@dataclass
class Outcome:
    jobs: list[Job]
    end_s: float
    steps: list[tuple[float, float]]

    def rate(self, start_s: float, end_s: float) -> float:
        done = sum(1 for job in self.jobs if job.done_s is not None and start_s <= job.done_s < end_s)
        return done / (end_s - start_s)

    def within_slo(self) -> float:
        return sum(1 for job in self.jobs if job.done_s and job.done_s - job.arrived_s <= job.slo_s) / len(
            self.jobs
        )

    def ttfts(self) -> list[float]:
        return sorted(job.done_s - job.arrived_s for job in self.jobs if job.done_s is not None)

    def offloaded(self, start_s: float = 0.0) -> float:
        known = [job.decision for job in self.jobs if job.decision and job.arrived_s >= start_s]
        return sum(decision.offloaded for decision in known) / max(1, len(known))


class Fluid:
    """Two pools and a link. `gbps` is a figure, or steps of (from second, Gbit/s)."""

    def __init__(
        self,
        policy: Policy,
        gbps: float | list[tuple[float, float]],
        *,
        local: int = 3,
        prfaas: int = 4,
        by_deadline: bool = False,
        rtt_s: float = 0.04,
    ) -> None:
        near, far = profiles()
        self.policy = policy
        self.pools = {"west": Pool(local, near, by_deadline), "east": Pool(prfaas, far, by_deadline)}
        self.steps = [(0.0, gbps)] if isinstance(gbps, (int, float)) else gbps
        self.rate_bps = self.steps[0][1] * 1e9
        self.rtt_s = rtt_s
        self.now = 0.0
        self.sending: list[Job] = []  # in order of prefill start; the first is on the wire
        self.sent_s = 0.0
        self.held: dict[str, Job] = {}
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.serial = 0
        self.wire_event = 0

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        self.serial += 1
        heapq.heappush(self.events, (when_s, self.serial, what))

    def run(self, jobs: Iterable[Job], until_s: float = math.inf, keep: int | None = None) -> Outcome:
        """All jobs at their time; with `keep`, so many are kept outstanding instead (closed loop)."""
        todo = list(jobs)
        for start_s, gbps in self.steps[1:]:
            self.at(start_s, lambda gbps=gbps: self.set_rate(gbps * 1e9))
        feed = iter(todo)
        if keep is None:
            for job in todo:
                self.at(job.arrived_s, lambda job=job: self.route(job))
        else:

            def more() -> None:
                job = next(feed, None)
                if job is not None:
                    job.arrived_s = self.now
                    self.route(job)

            self.more = more
            for k in range(keep):
                self.at(k * 0.001, more)
        self.closed = keep is not None
        while self.events and self.events[0][0] <= until_s:
            self.now, _, what = heapq.heappop(self.events)
            what()
        return Outcome([job for job in todo if job.asked], self.now, self.steps)

    def snapshot(self) -> Snapshot:
        self.advance_wire()
        sites = {
            name: SiteObservation(
                name, self.now, pool.size, int(name == "west"), prefill_backlog_s=pool.backlog_s(self.now)
            )
            for name, pool in self.pools.items()
        }
        backlog = sum(job.left_bits for job in self.sending) / 8
        link = LinkEstimate(
            LINK,
            self.now,
            self.rate_bps,
            self.rate_bps,
            self.rate_bps,
            self.rtt_s,
            backlog_bytes=int(backlog),
            up=self.rate_bps > 0,
        )
        return Snapshot(self.now, sites, {LINK: link})

    def route(self, job: Job) -> None:
        job.asked += 1
        view = RequestView(job.name, job.tokens, job.arrived_s, home="west")
        decision = self.policy.decide(view, self.snapshot(), self.now)
        job.decision = decision
        if decision.action is Action.HOLD:
            self.held[job.name] = job
            return
        self.held.pop(job.name, None)
        if decision.action is not Action.DISPATCH:
            job.shed = True
            return
        self.policy.on_dispatch(request=view, decision=decision, now=self.now)
        pool = self.pools[decision.prefill_site]
        self.serial += 1
        order = (decision.order_s or decision.deadline_s) if pool.by_deadline else self.now
        heapq.heappush(pool.queue, (order, self.serial, job))
        pool.queued_s += pool.profile.prefill_s(job.tokens)
        self.start(pool)

    def ask_held(self) -> None:
        for job in sorted(self.held.values(), key=lambda job: job.decision.deadline_s):
            self.route(job)

    def start(self, pool: Pool) -> None:
        while pool.free and pool.queue:
            job = heapq.heappop(pool.queue)[2]
            took_s = pool.profile.prefill_s(job.tokens)
            pool.queued_s -= took_s
            pool.free -= 1
            pool.ends[job.name] = self.now + took_s
            if job.decision.offloaded:
                share = min(1.0, 8192 / job.tokens)
                self.at(self.now + took_s * share, lambda job=job: self.enqueue(job))
            self.at(self.now + took_s, lambda job=job, pool=pool: self.prefilled(job, pool))

    def prefilled(self, job: Job, pool: Pool) -> None:
        pool.free += 1
        del pool.ends[job.name]
        job.prefilled = True
        self.policy.on_prefill_done(request=job.name, now=self.now)
        if not job.decision.offloaded:
            self.finish(job)
        elif job not in self.sending and job.left_bits <= 0:
            self.at(self.now + self.rtt_s, lambda: self.finish(job))
        self.start(pool)
        self.ask_held()

    def enqueue(self, job: Job) -> None:
        self.advance_wire()
        job.left_bits = job.decision.transfer_bytes * 8
        self.sending.append(job)
        self.plan_wire()

    def set_rate(self, rate_bps: float) -> None:
        self.advance_wire()
        self.rate_bps = rate_bps
        self.plan_wire()
        self.ask_held()

    def advance_wire(self) -> None:
        bits = self.rate_bps * (self.now - self.sent_s)
        self.sent_s = self.now
        for job in self.sending:
            part = min(bits, job.left_bits)
            job.left_bits -= part
            bits -= part

    def plan_wire(self) -> None:
        self.wire_event += 1
        if self.sending and self.rate_bps > 0:
            mine = self.wire_event
            self.at(self.now + self.sending[0].left_bits / self.rate_bps, lambda: self.wire_done(mine))

    def wire_done(self, event: int) -> None:
        if event != self.wire_event:
            return
        self.advance_wire()
        job = self.sending.pop(0)
        job.left_bits = 0.0
        if job.prefilled:
            self.at(self.now + self.rtt_s, lambda: self.finish(job))
        self.plan_wire()
        self.ask_held()

    def finish(self, job: Job) -> None:
        assert job.done_s is None, "answered twice"
        job.done_s = self.now
        self.policy.on_first_token(request=job.name, now=self.now)
        self.policy.on_finished(request=job.name, now=self.now)
        if self.closed:
            self.more()


def make_policy(name: str, **config: object) -> Policy:
    near, far = profiles()
    fleet = Fleet({("west", ""): near, ("east", ""): far}, frozenset({"west"}))
    return create_policy(PolicyConfig(name=name, **config), fleet)


def make_jobs(count: int, rps: float, seed: int = 1, burst: float = 1.0) -> list[Job]:
    """Gamma arrivals of squared coefficient of variation `burst` (1: Poisson)."""
    rng = random.Random(seed)
    local, _ = profiles()
    now, jobs = 0.0, []
    for k, tokens in enumerate(lengths(rng, count)):
        now += rng.gammavariate(1 / burst, burst / rps)
        jobs.append(Job(str(k), tokens, now, 2.0 + 2 * local.prefill_s(tokens)))
    return jobs


@pytest.fixture(scope="session")
def fluid() -> ModuleType:
    """This module, which tests can't import by name."""
    return sys.modules[__name__]
