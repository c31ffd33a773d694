"""What the door knows of a server's load is kept until something of it changes, and never longer."""

from __future__ import annotations

import asyncio
import math
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.config.loading import check
from prfaas.config.router import RouterConfig
from prfaas.model.observations import InstanceObservation, Role, SiteObservation
from prfaas.router.fleet import Reported, ServerHandle, ServerPool

K_MAX_AGE_S = 5.0


def config(*names: str, models: tuple[str, ...] = ("m",), east_models: tuple[str, ...] = ()) -> RouterConfig:
    west = [{"name": name, "role": "prefill", "url": "http://h:1", "bootstrap_port": 2} for name in names]
    east = {**west[0], "name": "e", "models": list(east_models)}
    found = {
        "models": [{"name": name} for name in models],
        "sites": [
            {"name": "west", "servers": [*west, {"name": "d", "role": "decode", "url": "http://h:2"}]},
            {"name": "empty", "servers": []},
            {"name": "east", "servers": [east]},
        ],
        "links": [{"source": "east", "target": "west", "rate_mbps": 10000, "rtt_ms": 1}],
    }
    return check(found, RouterConfig, "test")


def handle_of(role: Role) -> ServerHandle:
    (site, server), *_ = config("p").servers()
    return ServerHandle(site, server, cast(Any, None), cast(Any, None), role=role)


def observed_anew(handle: ServerHandle, now: float) -> InstanceObservation:
    """All of it from what is known now, as it would be without anything kept."""
    fresh = now - handle.reported.at_s <= K_MAX_AGE_S
    said = handle.reported if fresh else Reported(max_running=handle.reported.max_running)
    others = max(0, said.waiting_uncached_tokens - handle.told_tokens)
    speed, backlog_s = handle.reported.prefill_tokens_per_s, None
    if not others or speed:
        backlog_s = handle.prefilling.backlog_s(now) + (others / speed if speed else 0.0)
    free = said.total_tokens - said.used_tokens if fresh and said.total_tokens is not None else None
    return InstanceObservation(
        instance=handle.name,
        site=handle.site,
        role=handle.role,
        at_s=max(0.0, handle.reported.at_s),
        running=max(said.running, handle.in_flight - said.waiting if handle.role is Role.DECODE else 0),
        waiting=said.waiting,
        waiting_uncached_tokens=others + handle.pending_tokens,
        prefill_backlog_s=backlog_s,
        chunk_tokens=handle.chunk_tokens,
        prefill_requests=handle.prefill_requests or math.inf,
        prefill_tokens_per_s=speed,
        free_tokens=None if free is None else max(0, free),
        total_tokens=handle.reported.total_tokens,
        max_running=handle.reported.max_running,
        healthy=now >= handle.down_until_s and now >= handle.rests_until_s and not handle.broken,
        draining=handle.draining,
        others_tokens=others,
    )


reports = st.builds(
    Reported,
    running=st.integers(0, 3),
    waiting=st.integers(0, 3),
    waiting_uncached_tokens=st.sampled_from([0, 700]),
    used_tokens=st.integers(0, 9),
    total_tokens=st.sampled_from([None, 5]),
    max_running=st.sampled_from([None, 8]),
    prefill_tokens_per_s=st.sampled_from([None, 5000.0]),
)


@given(st.sampled_from(list(Role)), st.data())
def test_a_server_is_observed_as_it_is_whatever_was_kept(role: Role, data: st.DataObject) -> None:
    handle, now, keys = handle_of(role), 0.0, []
    for _ in range(data.draw(st.integers(1, 20))):
        now += data.draw(st.sampled_from([0.0, 0.3, 1.0, K_MAX_AGE_S]))
        what = data.draw(st.integers(0, 9))
        if what == 0:
            told = data.draw(reports)
            handle.reported = Reported(now, *[getattr(told, name) for name in Reported.__slots__[1:]])
        elif what == 1:
            keys.append(handle.prefilling.add(data.draw(st.floats(0, 3)), now))
            handle.pending_tokens += 100
        elif what == 2 and keys:
            handle.prefilling.remove(keys.pop(data.draw(st.integers(0, len(keys) - 1))), now)
        elif what == 3:
            handle.in_flight += 1
        elif what == 4:
            handle.told_tokens = handle.pending_tokens
        elif what == 5:
            handle.mark_down(now, 1.0, "no answer")
        elif what == 6:
            handle.on_error(now, 1.0)
        elif what == 7:
            handle.on_answered()
        elif what == 8:
            handle.draining = not handle.draining
        else:
            handle.role, handle.broken, handle.chunk_tokens = role, data.draw(st.sampled_from(["", "x"])), 512
        for _ in range(2):
            assert handle.observe(now, K_MAX_AGE_S) == observed_anew(handle, now)


def test_what_a_server_says_beyond_our_own_requests_is_told_as_others() -> None:
    handle = handle_of(Role.PREFILL)
    handle.prefilling.add(2.0, 10.0)
    handle.pending_tokens = handle.told_tokens = 700
    handle.reported = Reported(10.0, waiting_uncached_tokens=1000, prefill_tokens_per_s=100.0)
    seen = handle.observe(10.0, K_MAX_AGE_S)
    assert (seen.others_tokens, seen.prefill_backlog_s) == (300, 5.0)
    # Ours is being sent to where it is decoded: the server has nothing of it waiting, and hasn't answered.
    handle.reported = Reported(11.0, waiting_uncached_tokens=0, prefill_tokens_per_s=100.0)
    seen = handle.observe(11.0, K_MAX_AGE_S)
    assert (seen.others_tokens, seen.prefill_backlog_s) == (0, 1.0)


@pytest.mark.parametrize("fresh_s", [0.0, K_MAX_AGE_S / 2])
def test_a_report_counts_until_it_is_too_old(fresh_s: float) -> None:
    handle = handle_of(Role.PREFILL)
    handle.reported = Reported(10.0, waiting=3)
    assert handle.observe(10.0 + fresh_s, K_MAX_AGE_S).waiting == 3
    assert handle.observe(10.0 + K_MAX_AGE_S, K_MAX_AGE_S).waiting == 3
    assert handle.observe(10.1 + K_MAX_AGE_S, K_MAX_AGE_S).waiting == 0
    assert handle.observe(10.1 + K_MAX_AGE_S, 2 * K_MAX_AGE_S).waiting == 3, "a reload has changed the age"


def test_servers_are_listed_by_site_and_model_as_the_file_has_them_now() -> None:
    pool = ServerPool()

    def listed(model: str) -> list[tuple[str, list[str]]]:
        return [(site, [one.name for one in handles]) for site, handles in pool.serving(model)]

    async def main() -> None:
        pool.apply(config("a", "b", models=("m", "n"), east_models=("n",)), {})
        assert listed("m") == [("west", ["a", "b", "d"]), ("empty", []), ("east", [])]
        assert listed("n") == [("west", ["a", "b", "d"]), ("empty", []), ("east", ["e"])]
        pool.apply(config("b", "c"), {})
        assert listed("m") == [("west", ["b", "c", "d"]), ("empty", []), ("east", ["e"])]
        await pool.close()

    asyncio.run(main())


instances = st.builds(
    InstanceObservation,
    instance=st.just("i"),
    site=st.just("s"),
    role=st.sampled_from(list(Role)),
    at_s=st.just(0.0),
    running=st.integers(0, 9),
    waiting=st.integers(0, 9),
    waiting_uncached_tokens=st.integers(0, 999),
    prefill_backlog_s=st.none() | st.floats(0, 9),
    max_running=st.none() | st.integers(0, 9),
    healthy=st.booleans(),
    draining=st.booleans(),
)


@given(st.lists(instances, max_size=6))
def test_a_site_is_the_sum_of_its_instances_that_take_something(listed: list[InstanceObservation]) -> None:
    site = SiteObservation.of("s", listed, 7.0)
    able = [one for one in listed if one.healthy and not one.draining]
    prefills = [one for one in able if one.role in (Role.PREFILL, Role.COLLOCATED)]
    decodes = [one for one in able if one.role in (Role.DECODE, Role.COLLOCATED)]
    known = [one for one in prefills if one.prefill_backlog_s is not None]
    limits = [one.max_running for one in decodes]
    assert site == SiteObservation(
        "s",
        7.0,
        len(prefills),
        len(decodes),
        prefill_backlog_s=sum(one.prefill_backlog_s or 0.0 for one in known),
        waiting_uncached_tokens=sum(one.waiting_uncached_tokens for one in prefills if one not in known),
        decode_running=sum(one.running for one in decodes),
        decode_waiting=sum(one.waiting for one in decodes),
        decode_slots=0 if None in limits else sum(limit or 0 for limit in limits),
        instances=tuple(listed),
    )
    given_directly = SiteObservation("s", 7.0, instances=tuple(listed))
    for one in (site, given_directly):
        assert (list(one.prefills), list(one.decodes)) == (prefills, decodes)
