from dataclasses import replace

import pytest

from prfaas.model.profiles import Curve, DecodeProfile, Profile
from prfaas.simulator.agenda import Agenda
from prfaas.simulator.engine import Engine
from prfaas.simulator.job import Job

PROFILE = Profile(
    "unit",
    prefill=Curve.of([1000], [1.0]),  # 1 ms a token
    kv=Curve.of([1000], [1e6]),
    decode=DecodeProfile.constant(0.1, 2),
    chunk_tokens=1000,
)


def engine(role, agenda, **kw) -> Engine:
    return Engine("e", "west", role, PROFILE, agenda, **kw)


def test_prefills_are_taken_in_turn_and_a_step_ends_for_all_in_it() -> None:
    agenda, seen = Agenda(), []
    one = engine("prefill", agenda)
    for name, tokens in (("a", 1500), ("b", 300)):
        one.prefill(
            Job(name, tokens, 1, on_chunk=lambda job, now, final: seen.append((job.payload, now, final))), 0.0
        )
    assert one.backlog_s == pytest.approx(1.8)
    agenda.run()
    # The second step holds a's last 500 tokens and b's 300: both are done at its end.
    assert seen == [("a", 1.0, False), ("a", pytest.approx(1.8), True), ("b", pytest.approx(1.8), True)]
    assert one.backlog_s == pytest.approx(0.0)
    assert one.backlog_tokens == 0


def test_a_prompt_that_a_step_has_cut_goes_on_before_what_is_more_urgent() -> None:
    agenda, seen = Agenda(), {}
    one = engine("prefill", agenda)

    def job(name: str, tokens: int, key: float) -> Job:
        return Job(
            name, tokens, 1, key=key,
            on_chunk=lambda job, now, final: seen.__setitem__(job.payload, now) if final else None,
        )  # fmt: skip

    one.prefill(job("long", 2500, 9.0), 0.0)
    one.prefill(job("late", 1000, 5.0), 0.0)
    agenda.run(0.5)
    one.prefill(job("urgent", 400, 1.0), 0.5)
    assert one.ahead_s(0.9, 0.5) == pytest.approx(2.0)  # all that is left of the long one
    agenda.run()
    # The third step ends the long one and takes 400 and 100 more, in order of urgency.
    assert seen == {
        "long": pytest.approx(3.0), "urgent": pytest.approx(3.0), "late": pytest.approx(3.9),
    }  # fmt: skip


def test_giving_up_the_prompt_that_a_step_has_cut_lets_the_next_begin() -> None:
    agenda, seen = Agenda(), []
    one = engine("prefill", agenda)
    jobs = [
        Job(tokens, tokens, 1, on_chunk=lambda job, now, final: seen.append((job.payload, now)))
        for tokens in (5000, 700)
    ]
    for each in jobs:
        one.prefill(each, 0.0)
    agenda.run(0.5)
    one.give_up(jobs[0], 0.5)
    assert one.work_s(0.5) == pytest.approx(0.5 + 0.7)
    agenda.run()
    assert seen == [(700, pytest.approx(1.7))]
    assert one.backlog_tokens == 0
    assert one.idle


def test_a_step_takes_no_more_prompts_than_it_may() -> None:
    agenda, seen = Agenda(), {}
    one = engine("prefill", agenda, prefill_requests=1)
    for name in "abc":
        one.prefill(
            Job(name, 100, 1, on_chunk=lambda job, now, final: seen.__setitem__(job.payload, now)), 0.0
        )
    agenda.run()
    assert seen == {"a": pytest.approx(0.1), "b": pytest.approx(0.2), "c": pytest.approx(0.3)}


def test_latency_delays_a_request_and_occupies_the_engine_for_nobody() -> None:
    agenda, seen = Agenda(), {}
    one = Engine("e", "west", "prefill", replace(PROFILE, latency_s=0.2), agenda, prefill_requests=1)
    for name in "ab":
        one.prefill(
            Job(name, 500, 1, on_chunk=lambda job, now, final: seen.__setitem__(job.payload, now)), 0.0
        )
    assert not one.idle
    assert one.backlog_s == 0.0
    agenda.run(0.2)
    assert one.backlog_s == pytest.approx(0.6)
    agenda.run()
    assert seen == {"a": pytest.approx(0.5), "b": pytest.approx(0.8)}


def test_a_request_given_up_or_whose_engine_dies_while_it_is_read_is_never_begun() -> None:
    agenda, seen = Agenda(), []
    one = Engine("e", "west", "prefill", replace(PROFILE, latency_s=0.2), agenda)
    jobs = [Job(name, 500, 1, on_chunk=lambda job, now, final: seen.append(job.payload)) for name in "ab"]
    one.prefill(jobs[0], 0.0)
    one.give_up(jobs[0], 0.1)
    agenda.at(0.3, lambda now: one.prefill(jobs[1], now))
    agenda.at(0.4, one.kill)
    agenda.run()
    assert not seen
    assert one.idle
    assert one.backlog_s == 0.0


def test_a_full_batch_makes_the_next_wait_and_all_in_it_advance_together() -> None:
    agenda, joined, done = Agenda(), {}, {}
    one = engine("decode", agenda)
    for name, tokens in (("a", 11), ("b", 21), ("c", 11)):
        job = Job(
            name, 10, tokens,
            on_join=lambda job, now: joined.__setitem__(job.payload, now),
            on_done=lambda job, now: done.__setitem__(job.payload, now),
        )  # fmt: skip
        one.decode(job, 0.0)
    agenda.run()
    assert joined == {"a": 0.0, "b": 0.0, "c": pytest.approx(1.0)}
    assert done == {"a": pytest.approx(1.0), "b": pytest.approx(2.0), "c": pytest.approx(2.0)}


def test_what_lands_in_mid_step_joins_the_batch_at_that_step_s_end() -> None:
    agenda, joined, ended = Agenda(), {}, {}
    one = engine("decode", agenda)

    def land(name: str, at_s: float, tokens: int) -> None:
        job = Job(
            name, 10, tokens,
            on_join=lambda job, now: joined.__setitem__(job.payload, now),
            on_done=lambda job, now: ended.__setitem__(job.payload, now),
        )  # fmt: skip
        agenda.at(at_s, lambda now: one.decode(job, now))

    land("alone", 0.05, 11)  # at once: no step runs
    land("between", 0.37, 5)
    land("at the end", 0.75, 3)  # of a step of 0.1 s; no place until `between` has ended
    land("after", 3.0, 2)
    agenda.run()
    assert joined == {
        "alone": 0.05, "between": pytest.approx(0.45),
        "at the end": pytest.approx(0.85), "after": 3.0,
    }  # fmt: skip
    assert ended == {
        "alone": pytest.approx(1.05), "between": pytest.approx(0.85),
        "at the end": pytest.approx(1.05), "after": pytest.approx(3.1),
    }  # fmt: skip


def test_a_collocated_engine_makes_no_token_while_it_prefills() -> None:
    agenda, done = Agenda(), []
    one = engine("collocated", agenda)
    one.decode(Job("a", 10, 11, on_done=lambda job, now: done.append(now)), 0.0)
    agenda.at(0.5, lambda now: one.prefill(Job("b", 400, 1), now))
    agenda.run()
    assert done == [pytest.approx(1.4)]  # 1.0 s of decode, 0.4 s of someone else's prefill


def test_those_without_room_for_their_pages_wait_in_order() -> None:
    agenda, granted = Agenda(), []
    one = engine("decode", agenda, pool_tokens=100)
    jobs = [Job(name, 60, 1) for name in "abc"]
    for job, tokens in zip(jobs, (60, 60, 30), strict=True):
        one.reserve(job, tokens, lambda job, now: granted.append(job.payload), 0.0)
    assert granted == ["a"]  # c would fit, but must not pass b
    one.release(jobs[0], 1.0)
    assert granted == ["a", "b", "c"]


def test_giving_up_a_queued_prefill_takes_its_backlog_and_calls_nothing() -> None:
    agenda, seen = Agenda(), []
    one = engine("prefill", agenda)
    jobs = [Job(name, 1000, 1, on_chunk=lambda job, now, final: seen.append(job.payload)) for name in "ab"]
    for job in jobs:
        one.prefill(job, 0.0)
    one.give_up(jobs[1], 0.1)
    assert one.backlog_s == pytest.approx(1.0)
    agenda.run()
    assert seen == ["a"]
    assert one.backlog_s == pytest.approx(0.0)


def test_a_killed_engine_holds_nothing_and_ends_nothing() -> None:
    agenda, seen = Agenda(), []
    one = engine("prefill", agenda)
    one.prefill(Job("a", 1000, 1, on_chunk=lambda job, now, final: seen.append(job.payload)), 0.0)
    agenda.at(0.5, one.kill)
    agenda.run()
    assert not seen
    assert one.idle
    assert not one.up


def test_bringing_back_what_is_up_changes_nothing() -> None:
    agenda, done = Agenda(), []
    one = engine("decode", agenda)
    one.decode(Job("a", 10, 11, on_done=lambda job, now: done.append(now)), 0.0)
    agenda.at(0.55, one.restart)
    agenda.run()
    assert done == [pytest.approx(1.0)]
