"""Metrics of what goes between sites, and whether any of it goes beside the pumps."""

from __future__ import annotations

from prfaas_testbed.experiment.registry import Unsupported, metric
from prfaas_testbed.experiment.view import View, field, number


@metric("sites_isolated")
def _sites_isolated(view: View) -> float:
    """1 where no site could open another's sockets nor reach it but through the WAN."""
    rows = view.events("isolation")
    if not rows:
        raise Unsupported("isolation wasn't tried")
    return float(all(bool(field(row, "isolated")) for row in rows))


@metric("control_by_pump_share")
def _control_by_pump(view: View) -> float:
    """Of the connections of SGLang's own bootstrap and control between sites when a load has ended, those
    that pass by the pumps."""
    rows = view.events("accounting")
    forwarded = sum(number(row, "forwarded") or 0 for row in rows)
    in_clear = sum(number(row, "in_clear") or 0 for row in rows)
    if not forwarded + in_clear:
        raise Unsupported("no such connection")
    return forwarded / (forwarded + in_clear)


@metric("outside_pumps_bytes", "bytes")
def _outside_pumps(view: View) -> float:
    """What left the sites while the load ran that wasn't the pumps', in frames: whatever it was, it went in
    the clear. Whole connections are in it, however soon they ended."""
    found = [
        value
        for row in view.events("accounting")
        if (value := number(row, "outside_pumps_bytes")) is not None
    ]
    if not found:
        raise Unsupported("no site counted it")
    return sum(found)
