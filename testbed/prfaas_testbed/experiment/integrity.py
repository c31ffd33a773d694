"""Metrics of whether what arrived is what was sent, by both ends' own digests and by size."""

from __future__ import annotations

from prfaas.config.run import RequestRow
from prfaas_testbed.experiment.registry import Unsupported, metric
from prfaas_testbed.experiment.view import View, field, number


def _moved(view: View) -> list[RequestRow]:
    """Answered requests whose bytes came from another site."""
    rows = view.answered()
    moved = [row for row in rows if field(row, "transfer") != "local"]
    if not moved:
        raise Unsupported("nothing was moved between sites" if rows else "no request was answered")
    return moved


def _has_both(row: RequestRow) -> bool:
    return bool(field(row, "source_digest")) and bool(field(row, "landed_digest"))


@metric("digests_equal_share")
def _digests_equal_share(view: View) -> float:
    """Of the answered requests whose digests both sides wrote down, the share in which they are equal;
    digests_missing counts the others."""
    both = [row for row in _moved(view) if _has_both(row)]
    if not both:
        raise Unsupported("no request has the digests of both sides")
    return sum(field(row, "source_digest") == field(row, "landed_digest") for row in both) / len(both)


@metric("digests_missing")
def _digests_missing(view: View) -> float:
    """Answered requests of which either side wrote no digest down, as where its disk was full: nothing says
    whether what landed is what was sent."""
    return sum(not _has_both(row) for row in _moved(view))


@metric("kv_bytes_gap_share")
def _kv_bytes_gap_share(view: View) -> float:
    """Bytes moved against what model and prompt length predict: the largest gap of a request."""
    gaps = []
    for row in view.answered():
        wanted = number(row, "wanted_kv_bytes")
        if wanted and row.kv_bytes is not None:
            gaps.append(abs(row.kv_bytes - wanted) / wanted)
    if not gaps:
        raise Unsupported("no request says what it should have moved")
    return max(gaps)


def _after_a_move(view: View) -> list[RequestRow]:
    return [row for row in view.answered() if number(row, "moved_tokens")]


@metric("prefix_moves")
def _prefix_moves(view: View) -> float:
    """Answered requests of which a part was brought to their prefill server from another site's, of the model
    that has fewest of them."""
    found = dict.fromkeys({row.model for row in view.answered()}, 0)
    for row in _after_a_move(view):
        found[row.model] += 1
    if not found:
        raise Unsupported("no request was answered")
    return min(found.values())


@metric("moved_as_cached_share")
def _moved_as_cached_share(view: View) -> float:
    """Share of them whose prefill server reports just as many tokens as cached."""
    rows = _after_a_move(view)
    if not rows:
        raise Unsupported("no prefix was moved")
    return sum(row.cached_tokens == number(row, "moved_tokens") for row in rows) / len(rows)


@metric("moved_bytes_gap_share")
def _moved_bytes_gap_share(view: View) -> float:
    """What pumps sent beyond requests' KV and states, against what moved prefixes have by model and length.
    Auxiliary data, 1,600 bytes a request, is in the gap."""
    wanted = sum(number(row, "wanted_moved_bytes") or 0 for row in _after_a_move(view))
    sent = [number(row, "payload_bytes") for row in view.events("accounting")]
    if not wanted or None in sent:
        raise Unsupported("no prefix was moved, or a site gave no account of its bytes")
    kv = sum(row.kv_bytes or 0 for row in view.requests() if field(row, "transfer") == "wan")
    return abs(sum(size or 0 for size in sent) - kv - wanted) / wanted
