"""Names, sums over instances, and what follows from an estimate or a path."""

from __future__ import annotations

import pytest

from prfaas.model.decisions import CacheMove, PathPrediction
from prfaas.model.ids import LinkId
from prfaas.model.observations import InstanceObservation, LinkEstimate, Role, SiteObservation


def test_a_link_reads_as_it_prints() -> None:
    link = LinkId("east", "west")
    assert str(link) == "east>west"
    assert LinkId.parse("east>west") == link == ("east", "west")


@pytest.mark.parametrize("text", ["", "east", ">west", "east>", "a>b>c"])
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected SOURCE>TARGET"):
        LinkId.parse(text)


def test_a_site_is_the_sum_of_what_takes_work() -> None:
    def one(name: str, role: Role, **more: object) -> InstanceObservation:
        return InstanceObservation(name, "west", role, 1.0, **more)  # type: ignore[arg-type]

    listed = [
        one("p", Role.PREFILL, prefill_backlog_s=2.5),
        one("q", Role.PREFILL, waiting_uncached_tokens=700),
        one("r", Role.PREFILL, prefill_backlog_s=9.0, healthy=False),
        one("d", Role.DECODE, running=3, waiting=1, max_running=8),
        one("e", Role.DECODE, running=5, max_running=8, draining=True),
        one("c", Role.COLLOCATED, prefill_backlog_s=0.5, running=2, max_running=4),
    ]
    site = SiteObservation.of("west", listed, 1.5)
    assert (site.prefill_instances, site.decode_instances) == (3, 2)
    assert site.prefill_backlog_s == 3.0
    assert site.waiting_uncached_tokens == 700
    assert (site.decode_running, site.decode_waiting, site.decode_slots) == (5, 1, 12)
    assert len(site.instances) == 6


def test_unknown_batch_limits_are_no_limit() -> None:
    listed = [InstanceObservation("d", "west", Role.DECODE, 0.0, max_running=None)]
    assert SiteObservation.of("west", listed, 0.0).decode_slots == 0


def test_what_is_reserved_or_down_is_not_usable() -> None:
    link = LinkId("east", "west")
    assert LinkEstimate(link, 0.0, 10e9, 9e9, 11e9, 0.04, reserved_bps=4e9).usable_bps == 6e9
    assert LinkEstimate(link, 0.0, 10e9, 9e9, 11e9, 0.04, up=False).usable_bps == 0


def test_a_path_knows_its_link_and_its_name() -> None:
    fields = {"ttft_s": 1.0, "queue_s": 0.0, "prefill_s": 1.0, "tail_s": 0.0, "uncached_tokens": 9}
    inside = PathPrediction("west", "west", transfer_bytes=0, **fields)  # type: ignore[arg-type]
    moved = PathPrediction(
        "west",
        "west",
        transfer_bytes=0,
        cache_move=CacheMove("east", "west", 5, 50),
        **fields,  # type: ignore[arg-type]
    )
    out = PathPrediction("east", "west", transfer_bytes=7, **fields)  # type: ignore[arg-type]
    assert (inside.link, inside.label) == (None, "west")
    assert (moved.link, moved.label, moved.cache_move.link) == (None, "west+move", LinkId("east", "west"))
    assert (out.link, out.label) == (LinkId("east", "west"), "east")
