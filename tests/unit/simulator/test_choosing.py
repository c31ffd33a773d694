"""Which instance: the short way for many equal ones answers as the long one does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prfaas.model.profiles import Curve, DecodeProfile, Profile
from prfaas.simulator.agenda import Agenda
from prfaas.simulator.choosing import Ranked, pick_decode, pick_prefill
from prfaas.simulator.engine import Engine
from prfaas.simulator.job import Job
from prfaas.simulator.tally import Tally
from prfaas.workload.requests import TimedRequest

K_PROFILE = Profile(
    "unit",
    Curve.of([100, 1000], [1, 10]),
    Curve.of([100, 1000], [1000, 10_000]),
    decode=DecodeProfile.constant(0.01, 2),
    pool_tokens=4000,
)
K_REQUEST = TimedRequest(0, 0.0, 500, 10)

roles = st.sampled_from(["prefill", "decode", "collocated"])
one_engine = st.tuples(
    roles,
    st.sampled_from([0.0, 1.0, 1.0, 2.5]),  # backlog
    st.integers(0, 4),  # requests that hold or want pages
    st.integers(0, 2),  # of them in the batch
    st.sampled_from(["up", "up", "up", "draining", "killed", "restarted"]),
)


def made(index: int, role: str, backlog_s: float, held: int, landed: int, state: str) -> Engine:
    engine = Engine(f"e{index}", "here", role, K_PROFILE, Agenda())  # type: ignore[arg-type]
    if state == "killed":
        engine.kill(0.0)
        return engine
    if role != "prefill":
        jobs = [Job(None, 500, 10) for _ in range(held)]
        for job in jobs:
            engine.reserve(job, 1500, lambda job, now: None, 0.0)
        for job in jobs[:landed]:
            if job.reserved:
                engine.decode(job, 0.0)
    engine.backlog_s = backlog_s
    engine.drain(state == "draining")
    if state == "restarted":
        engine.kill(0.0)
        engine.restart(0.0)
    return engine


def plain_prefill(engines: list[Engine]) -> Engine | None:
    able = [one for one in engines if one.role != "decode" and one.up and not one.draining]

    def cost_s(engine: Engine) -> float:
        full = engine.role == "collocated" and engine.running + engine.waiting >= engine.max_batch
        return engine.backlog_s + (1e3 if full else 0.0)

    return min(able, key=cost_s, default=None)


def plain_decode(engines: list[Engine]) -> Engine | None:
    able = [one for one in engines if one.role != "prefill" and one.up and not one.draining]
    return min(able, key=lambda one: (one.assigned + one.waiting) / one.max_batch, default=None)


@given(st.lists(one_engine, max_size=6))
def test_the_short_way_takes_the_instance_that_the_long_one_takes(kinds) -> None:
    engines = [made(index, *kind) for index, kind in enumerate(kinds)]
    assert pick_prefill(Ranked.by_backlog(engines), K_REQUEST, 0.0, "fcfs", 0.0, {}) is plain_prefill(engines)
    assert pick_decode(Ranked.by_fullness(engines)) is plain_decode(engines)


@given(st.lists(one_engine, min_size=1, max_size=6), st.data())
def test_what_is_kept_of_an_instance_is_what_the_instance_has(kinds, data) -> None:
    engines = [made(index, *kind) for index, kind in enumerate(kinds)]
    backlogs, fullnesses = Ranked.by_backlog(engines), Ranked.by_fullness(engines)
    tally = Tally(engines)
    for _ in range(8):
        engine = data.draw(st.sampled_from(engines))
        what = data.draw(
            st.sampled_from(
                ["prefill", "reserve", "decode", "drain", "kill", "restart", "give up", "end", "role"]
            )
        )
        if what == "prefill" and engine.role != "decode" and engine.up:
            engine.prefill(Job(None, 700, 10), 0.0)
        elif what == "reserve" and engine.role != "prefill" and engine.up:
            engine.reserve(Job(None, 500, 10), 900, lambda job, now: None, 0.0)
        elif what == "decode" and engine.role != "prefill" and engine.up:
            engine.decode(Job(None, 500, 10), engine._agenda.now)
        elif what == "drain":
            engine.drain(not engine.draining)
        elif what == "kill":
            engine.kill(0.0)
        elif what == "restart":
            engine.restart(0.0)
        elif what == "give up" and engine.role != "decode" and engine.up:
            job = Job(None, 900, 10)
            engine.prefill(job, 0.0)
            engine.give_up(job, 0.0)
        elif what == "end":
            engine._agenda.run(engine._agenda.now + 3.0)
        elif what == "role" and engine.idle and engine.role != "collocated":
            engine.become("decode" if engine.role == "prefill" else "prefill", engine._agenda.now)
        assert backlogs.figures == [one.backlog_s for one in engines]
        assert fullnesses.figures == [one.fullness for one in engines]
        tally.count()
        assert plain_tally(engines) == (
            tally.prefills, tally.decodes, tally.slots, tally.backlogs, tally.running, tally.waiting,
        )  # fmt: skip


def plain_tally(engines: list[Engine]) -> tuple[int, int, int, list[float], list[int], list[int]]:
    able = [one.up and not one.draining for one in engines]
    prefills = [a and one.role != "decode" for a, one in zip(able, engines, strict=True)]
    decodes = [a and one.role != "prefill" for a, one in zip(able, engines, strict=True)]
    return (
        sum(prefills),
        sum(decodes),
        sum(one.max_batch for d, one in zip(decodes, engines, strict=True) if d),
        [one.backlog_s if p else 0.0 for p, one in zip(prefills, engines, strict=True)],
        [one.running if d else 0 for d, one in zip(decodes, engines, strict=True)],
        [one.waiting if d else 0 for d, one in zip(decodes, engines, strict=True)],
    )
