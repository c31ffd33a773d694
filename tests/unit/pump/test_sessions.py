"""How many pumps, and streams, a site may have at a pump, and who makes room."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.model.errors import RemoteProtocolError
from prfaas.pump.sessions import Session, Sessions


@dataclass(eq=False)
class Told:
    heard_s: float


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in (("K_PUMPS_PER_SITE", 3), ("K_STREAMS_PER_SITE", 8), ("K_STREAMS_PER_PUMP", 5)):
        monkeypatch.setattr(f"prfaas.pump.sessions.{name}", most)


def boot(number: int, site: str = "east") -> Session:
    return site, number.to_bytes(16, "big")


@pytest.mark.usefixtures("few")
def test_the_pump_that_was_silent_for_longest_makes_room_for_one_more() -> None:
    sessions: Sessions[Told] = Sessions()
    streams = [Told(5.0), Told(3.0), Told(4.0)]
    for number, stream in enumerate(streams):
        assert sessions.join(boot(number), stream, ()) == []
    again = Told(6.0)
    assert sessions.join(boot(1), again, ()) == [], "another stream of one that is here takes no pump's place"
    assert sessions.join(boot(7), Told(9.0), ()) == [streams[2]], (
        "its newest word counts, of whichever stream"
    )
    sessions.leave(boot(2), streams[2])
    assert sessions.join(boot(8), Told(9.0), ()) == [streams[0]]


@pytest.mark.usefixtures("few")
def test_a_pump_at_work_stays_and_where_all_are_the_newcomer_is_refused_without_a_trace() -> None:
    sessions: Sessions[Told] = Sessions()
    streams = [Told(float(number)) for number in range(3)]
    for number, stream in enumerate(streams):
        sessions.join(boot(number), stream, ())
    with pytest.raises(RemoteProtocolError, match="pumps of one site at work"):
        sessions.join(boot(7), Told(9.0), {boot(0), boot(1), boot(2)})
    assert [sessions.of(boot(number)) for number in range(3)] == [[one] for one in streams]
    assert sessions.join(boot(7), Told(9.0), {boot(0), boot(2)}) == [streams[1]]


@pytest.mark.usefixtures("few")
def test_a_sites_streams_together_have_a_limit_and_another_site_has_its_own() -> None:
    sessions: Sessions[Told] = Sessions()
    idle = [Told(1.0) for _ in range(4)]
    for stream in idle:
        sessions.join(boot(0), stream, ())
    for _ in range(4):
        sessions.join(boot(1), Told(2.0), ())
    assert sessions.join(boot(2, "north"), Told(0.0), ()) == []
    with pytest.raises(RemoteProtocolError, match="streams of one site"):
        sessions.join(boot(1), Told(2.0), {boot(0)})
    assert sessions.join(boot(1), Told(2.0), ()) == idle
    with pytest.raises(RemoteProtocolError, match="streams of one pump"):
        sessions.join(boot(1), Told(2.0), ())


def test_another_sites_word_for_the_same_boot_id_is_another_pump() -> None:
    sessions: Sessions[Told] = Sessions()
    ours, theirs = Told(1.0), Told(2.0)
    sessions.join(boot(0), ours, ())
    sessions.join(boot(0, "north"), theirs, ())
    assert sessions.of(boot(0)) == [ours]
    sessions.leave(boot(0), theirs)
    assert sessions.of(boot(0)) == [ours]
    assert sessions.of(None) == []


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 12), st.booleans(), st.booleans(), st.sampled_from(["east", "north"])),
        max_size=120,
    )
)
def test_however_pumps_come_and_go_the_limits_hold_and_none_at_work_is_ended(
    steps: list[tuple[int, bool, bool, str]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, most in (("K_PUMPS_PER_SITE", 3), ("K_STREAMS_PER_SITE", 8), ("K_STREAMS_PER_PUMP", 5)):
            patch.setattr(f"prfaas.pump.sessions.{name}", most)
        sessions: Sessions[Told] = Sessions()
        here: dict[Told, Session] = {}
        busy: set[Session] = set()
        for now, (number, works, leaves, site) in enumerate(steps):
            key = boot(number, site)
            if leaves and here:
                stream, its = next(iter(here.items()))
                sessions.leave(its, stream)
                del here[stream]
                busy &= set(here.values())
                continue
            stream = Told(float(now))
            try:
                ended = sessions.join(key, stream, busy)
            except RemoteProtocolError:
                ended = []
            else:
                here[stream] = key
                if works:
                    busy.add(key)
            for one in ended:
                assert here[one] not in busy
                sessions.leave(here.pop(one), one)
            assert len(sessions) == len(set(here.values()))
            for its in set(here.values()):
                assert sorted(map(id, sessions.of(its))) == sorted(id(s) for s, k in here.items() if k == its)
                assert len(sessions.of(its)) <= 5
            for name in ("east", "north"):
                assert len({k for k in here.values() if k[0] == name}) <= 3
                assert sum(k[0] == name for k in here.values()) <= 8
