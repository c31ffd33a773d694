"""A simulated run for chrome://tracing or Perfetto: a row a request, its phases as spans."""

from __future__ import annotations

import json
import math

from prfaas.simulator.record import Record

K_US = 1e6


def chrome_trace(record: Record) -> str:
    """The record as a JSON array of trace events. Rows are reused once their request is over."""
    events: list[dict[str, object]] = []
    lanes: list[float] = []
    order = sorted(range(len(record)), key=lambda i: record.arrival_s[i])
    for i in order:
        start, end = record.arrival_s[i], record.arrival_s[i] + record.e2e_s[i]
        lane = next((n for n, free in enumerate(lanes) if free <= start), len(lanes))
        if lane == len(lanes):
            lanes.append(0.0)
        lanes[lane] = end
        site = record.names[record.site[i]] or "none"
        common = {"pid": 1, "tid": lane, "cat": site}
        details = {
            "prompt_tokens": record.prompt_tokens[i],
            "kv_bytes": record.kv_bytes[i],
            "reason": record.names[record.reason[i]],
            "error": record.names[record.error[i]],
        }
        ttft, moved = record.ttft_s[i], record.transfer_s[i]
        if math.isnan(ttft):
            events.append(_span(f"{record.index[i]} failed", start, end, common, details))
            continue
        moved = 0.0 if math.isnan(moved) else moved
        first = start + ttft
        events.append(
            _span(f"{record.index[i]} queue + prefill at {site}", start, first - moved, common, details)
        )
        if moved > 0:
            events.append(_span("transfer + wait for a place", first - moved, first, common, {}))
        events.append(_span("decode", first, end, common, {}))
    for at_s, text in record.events:
        events.append({"ph": "i", "s": "g", "name": text, "ts": at_s * K_US, "pid": 1, "tid": 0})
    for at_s, link, sent, backlog in record.link_rows:
        events.append(
            {
                "ph": "C",
                "name": link,
                "ts": at_s * K_US,
                "pid": 2,
                "args": {"bytes": sent, "backlog": backlog},
            }
        )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _span(
    name: str, start_s: float, end_s: float, common: dict[str, object], details: dict[str, object]
) -> dict[str, object]:
    return {
        "ph": "X",
        "name": name,
        "ts": start_s * K_US,
        "dur": max(0.0, end_s - start_s) * K_US,
        "args": details,
        **common,
    }
