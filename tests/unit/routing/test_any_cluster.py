"""Whatever servers and links tell, the slow loop's look answers: a plan, a step or nothing."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas.config.policy import SlowLoopConfig
from prfaas.model.ids import LinkId
from prfaas.model.observations import InstanceObservation, LinkEstimate, Role, SiteObservation, Snapshot
from prfaas.model.profiles import Curve, Profile
from prfaas.routing import SlowLoop, StageMeter, StepKind

K_SITES = ("west", "east", "north")


def profile(rng: Random) -> Profile:
    first_s, first_bytes = rng.choice([1e-9, 0.3, 100.0]), rng.choice([1.0, 1e6, 1e15])
    return Profile(
        "unit",
        Curve.of([1000, 2000], [first_s, first_s * rng.choice([1.0, 1.7])]),
        Curve.of([1000, 2000], [first_bytes, 2 * first_bytes]),
    )


def site(rng: Random, name: str, now: float) -> SiteObservation:
    listed = [
        InstanceObservation(
            f"{name}{k}", name, rng.choice(list(Role)), now,
            running=rng.choice([0, 1, 10**9]),
            waiting=rng.choice([0, 5, 10**9]),
            waiting_uncached_tokens=rng.choice([0, 10**12]),
            prefill_backlog_s=rng.choice([None, 0.0, 1e9]),
            max_running=rng.choice([None, 0, 1, 10**6]),
            healthy=rng.random() < 0.8,
            draining=rng.random() < 0.2,
        )
        for k in range(rng.randrange(7))
    ]  # fmt: skip
    return SiteObservation.of(name, listed, now)


def snapshot(rng: Random, now: float) -> Snapshot:
    sites = {name: site(rng, name, now) for name in K_SITES if rng.random() < 0.9}
    links = {}
    for source in sites:
        for target in sites:
            rate = rng.choice([0.0, 1e-6, 1e9, 1e14])
            if source != target and rng.random() < 0.8:
                link = LinkId(source, target)
                links[link] = LinkEstimate(
                    link, now, rate, rate, rate, 0.04,
                    backlog_bytes=rng.choice([0, 10**15]), up=rng.random() < 0.8,
                )  # fmt: skip
    return Snapshot(now, sites, links)


@settings(max_examples=150)
@given(seed=st.integers(0, 1 << 40))
def test_a_look_answers_whatever_it_is_told(seed: int) -> None:
    rng, now = Random(seed), 0.0
    profiles = {name: profile(rng) for name in K_SITES if rng.random() < 0.9}
    meter = StageMeter("west", profiles, rng.choice([1.0, 600.0]))
    loop = SlowLoop("west", SlowLoopConfig(dry_run=False, look_every_s=0.5, patience=1, settle_s=0))
    for _ in range(8):
        now += rng.choice([0.0, 0.3, 30.0])
        seen = snapshot(rng, now)
        for _ in range(rng.choice([0, 1, 20])):
            meter.request(rng.choice([0, 1, 10**4, 10**7]), rng.choice([0, 10**12]), now)
        if rng.random() < 0.7:
            meter.answered(rng.choice([0.0, 1e-9, 5.0, 1e9]), now)
        meter.sample(seen)
        if "west" not in seen.sites:
            continue
        before = loop.converting
        given_up = loop.overdue(seen.sites["west"], now)
        assert given_up is None or (given_up.kind, given_up.instance) == (StepKind.RESUME, before)
        loads, system = meter.loads(), meter.system(seen)
        if system is None:
            continue
        proposal = loop.look(seen.sites["west"], loads, system, now)
        if proposal is not None and proposal.step is not None and proposal.step.kind is StepKind.DRAIN:
            assert loop.converting == proposal.step.instance
            if rng.random() < 0.5:
                assert loop.on_drained(proposal.step.instance, now) is not None
                assert loop.on_switched(proposal.step.instance, now) is not None
