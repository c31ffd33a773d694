"""The profiled scheduler on virtual time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prfaas.model.errors import LocalProtocolError
from prfaas.model.profiles import Curve, DecodeProfile, Profile
from prfaas.router.fleet import Reported
from prfaas.router.loads import read_report
from prfaas_testbed.instances.profiled.core import ChunkDone, Event, Granted, Scheduler, TokenDone


def profile(state_bytes: int = 0, pool_tokens: int | None = None) -> Profile:
    return Profile(
        name="t",
        prefill=Curve.of([100, 1000], [0.1, 1.0]),  # 1 ms a token, no start-up
        kv=Curve.of([1, 1000], [state_bytes + 10, state_bytes + 10000]),
        state_bytes=state_bytes,
        decode=DecodeProfile.constant(0.01, 4),
        block_tokens=16,
        chunk_tokens=100,
        pool_tokens=pool_tokens,
    )


def run_out(scheduler: Scheduler, now: float = 0.0) -> list[Event]:
    """Steps to the end, releasing each request at its last event."""
    events: list[Event] = []
    while (at := scheduler.next_at()) is not None:
        now = max(now, at)
        fresh = scheduler.advance(now)
        for event in fresh:
            last = (
                event.final
                if isinstance(event, TokenDone)
                else (isinstance(event, ChunkDone) and event.final and scheduler.role == "prefill")
            )
            if last:
                fresh_after = scheduler.release(event.id, now)
                events += fresh_after
        events += fresh
    return events


def test_prefill_takes_the_profiles_time_chunk_by_chunk() -> None:
    scheduler = Scheduler(profile(), "prefill")
    scheduler.offer("a", range(250), 1, 0.0)
    chunks = [event for event in run_out(scheduler) if isinstance(event, ChunkDone)]
    assert [(c.first, c.last, c.final) for c in chunks] == [
        (0, 100, False),
        (100, 200, False),
        (200, 250, True),
    ]
    assert [c.at_s for c in chunks] == pytest.approx([0.1, 0.2, 0.25])


@pytest.mark.parametrize("pool_tokens", [None, 20_000])
def test_what_it_says_of_its_load_is_believed_by_the_router(pool_tokens: int | None) -> None:
    scheduler = Scheduler(profile(pool_tokens=pool_tokens), "prefill")
    scheduler.offer("a", range(250), 1, 0.0)
    data = json.dumps({"loads": [scheduler.load()]}).encode()
    reported, _ = read_report(data, Reported(), None, 1.0)
    assert (reported.at_s, reported.total_tokens) == (1.0, pool_tokens or 1 << 40)


def test_a_request_s_latency_keeps_nobody_waiting() -> None:
    scheduler = Scheduler(replace(profile(), latency_s=0.04), "prefill", prefill_requests=1)
    scheduler.offer("a", range(250), 1, 0.0)
    scheduler.offer("b", range(1000, 1100), 1, 0.0)
    chunks = [event for event in run_out(scheduler) if isinstance(event, ChunkDone)]
    # The first chunk of each is shorter by it, the others aren't.
    assert [c.at_s for c in chunks] == pytest.approx([0.06, 0.16, 0.21, 0.27])


def test_with_one_prompt_a_step_the_second_waits_for_the_first() -> None:
    scheduler = Scheduler(profile(), "prefill", prefill_requests=1)
    scheduler.offer("a", range(40), 1, 0.0)
    scheduler.offer("b", range(40), 1, 0.0)
    chunks = [event for event in run_out(scheduler) if isinstance(event, ChunkDone)]
    assert [(c.id, c.at_s) for c in chunks] == [("a", pytest.approx(0.04)), ("b", pytest.approx(0.08))]


def test_a_second_request_shares_the_chunk_that_the_first_leaves_room_in() -> None:
    scheduler = Scheduler(profile(), "prefill")
    scheduler.offer("a", range(40), 1, 0.0)
    scheduler.offer("b", range(1000, 1050), 1, 0.0)
    scheduler.offer("c", range(2000, 2050), 1, 0.0)
    done = {e.id: e.at_s for e in run_out(scheduler) if isinstance(e, ChunkDone) and e.final}
    assert done["a"] == pytest.approx(0.04)
    assert done["b"] == done["c"] == pytest.approx(0.14)


def test_what_waits_is_taken_by_priority_and_what_has_begun_first() -> None:
    scheduler = Scheduler(profile(), "prefill")
    for place, (name, priority) in enumerate(
        [("begun", 0), ("late", 1), ("soon", 3), ("tie", 3), ("then", 2)]
    ):
        scheduler.offer(name, range(1000 * place, 1000 * place + 150), 1, 0.0, priority=priority)
    ended = [e.id for e in run_out(scheduler) if isinstance(e, ChunkDone) and e.final]
    assert ended == ["begun", "soon", "tie", "then", "late"]


def test_a_cached_prefix_is_not_computed_again() -> None:
    scheduler = Scheduler(profile(), "prefill")
    scheduler.offer("a", range(160), 1, 0.0)
    run_out(scheduler)
    events = scheduler.offer("b", range(200), 1, 10.0)
    assert [e.cached_tokens for e in events if isinstance(e, Granted)] == [160]
    chunks = [e for e in run_out(scheduler, 10.0) if isinstance(e, ChunkDone)]
    assert [(c.first, c.last) for c in chunks] == [(160, 200)]
    assert chunks[0].at_s == pytest.approx(10.04)


def test_decode_batches_up_to_its_limit_and_the_rest_wait() -> None:
    scheduler = Scheduler(profile(), "decode", max_batch=2)
    for name in "abc":
        scheduler.offer(name, [ord(name)], 3, 0.0)
    events = [event for name in "abc" for event in scheduler.landed(name, 0.0)]
    assert [e.id for e in events if isinstance(e, TokenDone)] == ["a"]  # b joins at the next step
    finished = [e.id for e in run_out(scheduler) if isinstance(e, TokenDone) and e.final]
    assert finished == ["a", "b", "c"]
    assert scheduler.idle


def test_a_decode_request_holds_its_pool_from_the_grant_to_the_release() -> None:
    scheduler = Scheduler(profile(pool_tokens=100), "decode")
    assert [type(e) for e in scheduler.offer("a", range(60), 10, 0.0)] == [Granted]
    assert scheduler.offer("b", range(60), 10, 0.0) == []
    assert [e.id for e in scheduler.release("a", 1.0, keep=False)] == ["b"]


def test_what_never_fits_is_refused_and_leaves_no_trace() -> None:
    scheduler = Scheduler(profile(pool_tokens=100), "decode")
    with pytest.raises(LocalProtocolError):
        scheduler.offer("a", range(95), 10, 0.0)
    assert scheduler.idle
    assert scheduler.load()["num_used_tokens"] == 0


def test_an_abort_in_mid_step_frees_everything() -> None:
    scheduler = Scheduler(profile(), "prefill")
    scheduler.offer("a", range(250), 1, 0.0)
    scheduler.release("a", 0.05, keep=False)
    assert run_out(scheduler) == []
    assert scheduler.reserved_tokens == 0
    assert scheduler.next_at() is None


def test_a_late_caller_does_not_stretch_the_steps() -> None:
    scheduler = Scheduler(profile(), "prefill")
    scheduler.offer("a", range(250), 1, 0.0)
    chunks = [e.at_s for e in scheduler.advance(99.0) if isinstance(e, ChunkDone)]
    assert chunks == pytest.approx([0.1, 0.2, 0.25])


@example(
    [(1, 1, 0.0), (1, 1, 0.0), (2, 1, 0.0), (2, 1, 0.0), (3, 1, 0.0), (7, 1, 0.0), (300, 5, 0.0)],
    320,
    False,
    7,
)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 5), st.floats(0, 2)), min_size=1, max_size=12),
    st.integers(320, 1000),
    st.booleans(),
    st.sampled_from([0, 7]),
)
def test_every_request_ends_and_nothing_stays_reserved(
    asked: list[tuple[int, int, float]], pool: int, prefill: bool, state: int
) -> None:
    scheduler = Scheduler(profile(state, pool), "prefill" if prefill else "collocated", max_batch=2)
    todo = sorted((at, i, length, new) for i, (length, new, at) in enumerate(asked))
    finished: list[str] = []

    def see(events: list[Event], now: float) -> None:
        assert scheduler.reserved_tokens + scheduler.cache.used_tokens <= pool
        for event in events:
            assert event.at_s <= now + 1e-9
            last = isinstance(event, TokenDone) and event.final
            last = last or (prefill and isinstance(event, ChunkDone) and event.final)
            if last:
                finished.append(event.id)
                see(scheduler.release(event.id, now), now)

    for at, i, length, new in todo:
        while (step := scheduler.next_at()) is not None and step <= at:
            see(scheduler.advance(step), step)
        # Prompts of the same parity share prefixes.
        see(scheduler.offer(str(i), [i % 2, *range(length - 1)], new, at), at)
    while (step := scheduler.next_at()) is not None:
        see(scheduler.advance(step), step)
    assert sorted(finished) == sorted(str(i) for i in range(len(asked)))
    assert scheduler.idle
    assert scheduler.reserved_tokens == 0
