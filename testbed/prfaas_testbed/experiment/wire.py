"""Metrics from captured packets, and how far our own account is from them."""

from __future__ import annotations

from collections.abc import Iterator

from prfaas.config.run import EventRow
from prfaas_testbed.experiment.registry import Unsupported, metric
from prfaas_testbed.experiment.view import View, field, number


def pairs(view: View) -> Iterator[tuple[EventRow, EventRow]]:
    """Each site's packets in a repetition and model, with its account of the same load."""
    for repetition in view.run.repetitions:
        kept = [row for row in repetition.events if view.ours(row)]
        for packets in kept:
            if packets.event != "packets":
                continue
            for row in kept:
                if row.event == "accounting" and _key(row) == _key(packets):
                    yield packets, row


def partial(packets: EventRow, account: EventRow) -> str | None:
    """Why packets say less than the account does; None where both are of the whole load."""
    until_s, missed = number(packets, "until_s"), number(packets, "missed_packets")
    if until_s is not None and until_s < account.at_s:
        why = " because it held its most packets" if field(packets, "truncated") else ""
        return f"the capture ended at {until_s:g} s{why}, the load at {account.at_s:g} s"
    if missed:
        return f"the capture missed {missed:.0f} packets"
    if field(account, "started_again"):
        return "the site's pump was started again, and counts from there"
    return None


def beside(view: View) -> Iterator[tuple[EventRow, EventRow]]:
    """Pairs that can be compared. Raises Unsupported for the first that can't."""
    for packets, account in pairs(view):
        reason = partial(packets, account)
        if reason is not None:
            raise Unsupported(reason)
        yield packets, account


def _key(row: EventRow) -> tuple[object, ...]:
    return tuple(field(row, name) for name in ("site", "model", "part"))


def _senders(view: View) -> list[EventRow]:
    """Of each repetition's packets the row of the site that sent most."""
    found = []
    for repetition in view.run.repetitions:
        groups: dict[tuple[object, ...], list[EventRow]] = {}
        for row in repetition.events:
            if view.ours(row) and row.event == "packets":
                groups.setdefault(_key(row)[1:], []).append(row)
        found += [max(rows, key=lambda row: number(row, "payload_bytes") or 0) for rows in groups.values()]
    if not found:
        raise Unsupported("nothing was captured")
    return found


@metric("wire_bytes_gap_share", needs=("captures",))
def _bytes_gap(view: View) -> float:
    """Bytes of TCP's payload at the WAN's edge, each once, against the pumps' own count: the largest gap."""
    gaps = []
    for packets, account in beside(view):
        seen, claimed = number(packets, "payload_bytes"), number(account, "stream_bytes")
        # A site that only acknowledges sends little: a keep-alive outside the window would be a large share.
        if seen is not None and claimed and claimed > 1_000_000:
            gaps.append(abs(seen - claimed) / claimed)
    if not gaps:
        raise Unsupported("nothing was captured, or too little sent to compare")
    return max(gaps)


@metric("wire_retransmit_gap_share", needs=("captures",))
def _retransmit_gap(view: View) -> float:
    """Retransmitted bytes by packets against TCP_INFO's, the largest difference as a share of all sent."""
    gaps = []
    for packets, account in beside(view):
        seen, claimed = number(packets, "retransmitted_bytes"), number(account, "retransmitted_bytes")
        sent = number(packets, "payload_bytes")
        if seen is not None and claimed is not None and sent and sent > 1_000_000:
            gaps.append(abs(seen - claimed) / sent)
    if not gaps:
        raise Unsupported("nothing was captured, or too little sent to compare")
    return max(gaps)


@metric("wire_goodput_mbps", "Mbit/s", needs=("captures",))
def _goodput(view: View) -> float:
    """Bytes that arrived at the receiver's edge, each once, over first to last; the least repetition."""
    found = [value for row in _senders(view) if (value := number(row, "goodput_mbps")) is not None]
    if not found:
        raise Unsupported("too few packets")
    return min(found)


@metric("wire_rtt_min_ms", "ms", needs=("captures",))
def _rtt(view: View) -> float:
    """Least time from a segment to its acknowledgement at the sender's edge."""
    found = [value for row in _senders(view) if (value := number(row, "rtt_min_ms")) is not None]
    if not found:
        raise Unsupported("no segment was acknowledged cleanly")
    return min(found)


@metric("wire_silence_s", "s", needs=("captures",))
def _silence(view: View) -> float:
    """Longest time without a segment of data at the receiver's edge."""
    found = [value for row in _senders(view) if (value := number(row, "silence_s")) is not None]
    if not found:
        raise Unsupported("too few packets")
    return max(found)
