"""Metrics of how much: what an experiment's search found, and what the emulator carried."""

from __future__ import annotations

from prfaas.config.run import EventRow, LinkRow
from prfaas_testbed.experiment.registry import Unsupported, metric
from prfaas_testbed.experiment.view import View, field, number

K_BUSY_FROM, K_BUSY_TO = 0.25, 0.75


def _last(view: View) -> EventRow:
    rows = view.events("capacity")
    if not rows:
        raise Unsupported("no capacity was searched for")
    return rows[-1]


@metric("capacity_rps", "requests/s", needs=("capacity",))
def _capacity(view: View) -> float:
    """The highest rate that held the SLO below the lowest that broke it."""
    found = number(_last(view), "held_rps")
    if found is None:
        raise Unsupported("no rate that was tried held the SLO")
    return found


@metric("capacity_gap", needs=("capacity",))
def _gap(view: View) -> float:
    """The lowest rate that broke the SLO over the highest that held it: how well the capacity is known."""
    row = _last(view)
    held, broken = number(row, "held_rps"), number(row, "broken_rps")
    if held is None or broken is None:
        raise Unsupported("the search ended at a bound: capacity is beyond it")
    return broken / held


def _network_s(view: View, what: str) -> float:
    extra = view.run.model_extra or {}
    own = extra if view.part is None else (extra.get("part_runs") or {}).get(view.part) or {}
    found = (own.get("network_s") or {}).get(what)
    if found is None:
        raise Unsupported("the record doesn't say, or the run was stopped")
    return float(found)


@metric("network_up_s", "s")
def _up(view: View) -> float:
    """How long the emulated network took to come up."""
    return _network_s(view, "up")


@metric("network_down_s", "s")
def _down(view: View) -> float:
    """How long the emulated network took to go down, with all that still ran in its sites."""
    return _network_s(view, "down")


@metric("busy_mbps", "Mbit/s")
def _busy(view: View) -> float:
    """Ethernet frames that left the least busy direction of a link, over the middle half of the load."""
    rates = []
    for repetition in view.run.repetitions:
        loads: dict[tuple[object, ...], list[LinkRow]] = {}
        for row in repetition.links:
            if view.ours(row):
                loads.setdefault((row.link, field(row, "model"), field(row, "part")), []).append(row)
        for mine in loads.values():
            end_s = max(row.at_s for row in mine)
            middle = [row for row in mine if K_BUSY_FROM * end_s < row.at_s <= K_BUSY_TO * end_s]
            if middle:
                span_s = (K_BUSY_TO - K_BUSY_FROM) * end_s
                rates.append(sum(row.bytes for row in middle) * 8 / span_s / 1e6)
    if not rates:
        raise Unsupported("no link was watched")
    return min(rates)


@metric("link_drop_share")
def _link_drops(view: View) -> float:
    """Packets that links dropped, for loss that they were told or for a full queue, over all they carried."""
    carried = sum(number(row, "packets") or 0 for row in view.events("watch"))
    if not carried:
        raise Unsupported("the emulator wasn't watched")
    return sum(row.drops for row in view.links()) / carried


@metric("unplanned_drop_share")
def _drop_share(view: View) -> float:
    """Packets dropped that the emulation didn't mean to drop, over all it carried."""
    rows = view.events("watch")
    carried = sum(number(row, "packets") or 0 for row in rows)
    if not carried:
        raise Unsupported("the emulator wasn't watched")
    return sum(number(row, "unplanned_drops") or 0 for row in rows) / carried


@metric("sender_streams_lost")
def _streams_lost(view: View) -> float:
    """Connections that ended under the site that sent most, over all repetitions."""
    rows = view.events("accounting")
    if not rows:
        raise Unsupported("no site gave an account")
    sender = max(rows, key=lambda row: number(row, "payload_bytes") or 0)
    site = field(sender, "site")
    return sum(number(row, "streams_lost") or 0 for row in rows if field(row, "site") == site)
