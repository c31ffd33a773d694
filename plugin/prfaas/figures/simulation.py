"""A simulated run over time, from its run.json alone: queues, links, where requests went, TTFT."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from prfaas.config.run import Repetition, Run
from prfaas.figures.style import new_figure, numbered, save

K_BINS = 60


def draw_simulation(run: Run, folder: Path, repetition: int = 0) -> list[Path]:
    """One figure of four panels under one time axis; the paths written.

    None for a run without rows, nor for a set, whose parts have times of their own.
    """
    rows = next((one for one in run.repetitions if one.index == repetition), None)
    if rows is None or not rows.requests or run.parts:
        return []
    figure, (queue, links, share, ttft) = new_figure(4, 1, width=7.5, height=1.9, sharex=True)
    end_s = max(one.sent_s for one in rows.requests)
    edges = np.linspace(0, max(end_s, 1e-9), K_BINS + 1)
    middle = (edges[:-1] + edges[1:]) / 2
    table: dict[str, np.ndarray] = {"at_s": middle}

    for place, (site, points) in enumerate(sorted(_by(rows, "sites", "site").items())):
        at_s = np.array([one["at_s"] for one in points])
        backlog = _mean(at_s, np.array([one["prefill_backlog_s"] for one in points]), edges)
        decode = _mean(
            at_s, np.array([one["decode_running"] + one["decode_waiting"] for one in points]), edges
        )
        table[f"{site} prefill backlog s"] = backlog
        if np.nanmax(backlog, initial=0) > 0:
            queue.plot(middle, backlog, **numbered(place, f"{site}: prefill queued").kwargs(markers=False))
        if np.nanmax(decode, initial=0) > 0:
            table[f"{site} decoding"] = decode
            look = numbered(place + 4, f"{site}: requests decoding").kwargs(markers=False)
            queue.plot(middle, decode, **look)
    queue.set(ylabel="Instance-seconds,\nrequests", title="Queues")
    for place, (link, sent) in enumerate(sorted(_links(rows).items())):
        bits, _ = np.histogram([at for at, _ in sent], bins=edges, weights=[8 * size for _, size in sent])
        rate = bits / np.diff(edges) / 1e9
        table[f"{link} Gbit/s"] = rate
        links.plot(middle, rate, **numbered(place, link).kwargs(markers=False))
    links.set(ylabel="Gbit/s", title="Links", ylim=(0, None))
    sent_s = np.array([one.sent_s for one in rows.requests])
    sites = np.array([one.site or "none" for one in rows.requests])
    total, _ = np.histogram(sent_s, bins=edges)
    for place, site in enumerate(sorted(set(sites))):
        count, _ = np.histogram(sent_s[sites == site], bins=edges)
        part = np.divide(count, total, out=np.full(len(total), np.nan), where=total > 0)
        table[f"share at {site}"] = part
        share.plot(middle, part, **numbered(place, f"prefilled at {site}").kwargs(markers=False))
    share.set(ylabel="Share of requests", title="Where requests were prefilled", ylim=(0, 1))
    known = np.array([one.ttft_s is not None for one in rows.requests])
    times = np.array([one.ttft_s or 0.0 for one in rows.requests])
    for place, (label, q) in enumerate((("median", 0.5), ("P90", 0.9))):
        value = _quantile(sent_s[known], times[known], edges, q)
        table[f"TTFT {label} s"] = value
        ttft.plot(middle, value, **numbered(place, label).kwargs(markers=False))
    ttft.set(ylabel="Seconds", title="TTFT by time of arrival", xlabel="Simulated time, s", ylim=(0, None))
    for one in rows.events:
        for axis in (queue, links, share, ttft):
            axis.axvline(one.at_s, color="#999999", linewidth=0.8, linestyle=":")
    for axis in (queue, links, share, ttft):
        if axis.lines:
            axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    columns = list(table)
    values = zip(*(table[name] for name in columns), strict=True)
    return save(figure, folder, "simulation", columns, [[_number(value) for value in row] for row in values])


def _by(rows: Repetition, field: str, key: str) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for one in (rows.model_extra or {}).get(field, ()):
        found[str(one[key])].append(one)
    return found


def _links(rows: Repetition) -> dict[str, list[tuple[float, int]]]:
    found: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for one in rows.links:
        found[one.link].append((one.at_s, one.bytes))
    return found


def _mean(at_s: np.ndarray, value: np.ndarray, edges: np.ndarray) -> np.ndarray:
    total, _ = np.histogram(at_s, bins=edges, weights=value)
    count, _ = np.histogram(at_s, bins=edges)
    mean: np.ndarray = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    return mean


def _quantile(at_s: np.ndarray, value: np.ndarray, edges: np.ndarray, q: float) -> np.ndarray:
    place = np.digitize(at_s, edges[1:-1])
    return np.array(
        [np.quantile(value[place == i], q) if (place == i).any() else np.nan for i in range(len(edges) - 1)]
    )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
