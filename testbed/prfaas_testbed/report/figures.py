"""Figures of one run, from its record alone: TTFT by prompt length, links over time, transfers over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from prfaas.config.run import EventRow, LinkRow, RequestRow, Run
from prfaas.figures import new_figure, numbered, save
from prfaas_testbed.experiment.view import View, field, number

K_QUIET_EVENTS = (
    "watch", "accounting", "load", "isolation", "capture", "packets", "capacity", "cost",
)  # fmt: skip
K_MAX_PANELS = 4
K_MAX_BARS = 60
K_MOST_LINKS = 8
K_LEAST_SHARE = 0.005  # of the busiest link's bytes: acknowledgements stay in sight
K_WAITING = "#c9ced6"
K_DECODING = "#9bbf85"
K_EVENT = "#b02a30"


def draw_figures(run: Run, folder: Path) -> list[Path]:
    """All figures that the rows allow, as PNG and SVG with the CSV of what is drawn."""
    written: list[Path] = []
    parts: list[str | None] = [*run.parts] or [None]
    for part in parts:
        view = View(run, part)
        prefix = f"{part}-" if part else ""
        models = list(dict.fromkeys(row.model for row in view.requests()))[:K_MAX_PANELS]
        if not models:
            continue
        written += _ttft(view, models, folder / f"{prefix}ttft")
        written += _links(view, models, folder / f"{prefix}links")
        written += _transfers(view, models, folder / f"{prefix}transfers")
    return written


def _ttft(view: View, models: list[str], path: Path) -> list[Path]:
    """Each request a point: the system beside the plain server, and what the transfer took of it."""
    figure, axes = new_figure(1, len(models))
    rows: list[list[Any]] = []
    for ax, model in zip(axes, models, strict=True):
        narrowed = View(view.run, view.part, model)
        plain = [row for row in narrowed.baseline().values() if row.ttft_s is not None]
        ours = [row for row in narrowed.requests() if row.ttft_s is not None]
        near = [row for row in ours if field(row, "transfer") == "local"]
        far = [row for row in ours if field(row, "transfer") != "local"]
        for place, label, points in (
            (0, "plain server, one site", plain),
            (1, "prefill elsewhere, decode here", far),
            (3, "prefill and decode here", near),
        ):
            if not points:
                continue
            look = numbered(place, label)
            tokens, ttft = [row.prompt_tokens for row in points], [row.ttft_s or 0.0 for row in points]
            ax.plot(tokens, ttft, **look.kwargs() | {"linestyle": "", "alpha": 0.75})
            rows += [[model, label, row.prompt_tokens, row.ttft_s] for row in points]
        moved = [
            (row.prompt_tokens, end - start)
            for row in ours
            if (start := number(row, "transfer_start_s")) is not None
            and (end := number(row, "transfer_end_s")) is not None
        ]
        if moved:
            look = numbered(2, "of it, the transfer")
            ax.plot(*zip(*moved, strict=True), **look.kwargs() | {"linestyle": "", "alpha": 0.6})
            rows += [[model, "transfer", tokens, took] for tokens, took in moved]
        # Room for the legend above the points.
        ax.set(title=model, xlabel="prompt, tokens", ylim=(0, 1.35 * ax.get_ylim()[1]), xlim=(0, None))
    axes[0].set_ylabel("time to first token, s")
    axes[0].legend(loc="upper left")
    return save(figure, path.parent, path.name, ["model", "series", "prompt_tokens", "seconds"], rows)


def _links(view: View, models: list[str], path: Path) -> list[Path]:
    """Throughput of every direction of every link over time, with what was done to it."""
    figure, axes = new_figure(len(models), 1, width=8.0, height=2.5)
    rows: list[list[Any]] = []
    for ax, model in zip(axes, models, strict=True):
        links, events = first_links_and_events(view, model)
        for place, name in enumerate(busiest_links(links)):
            points = [row for row in links if row.link == name]
            times = np.array([row.at_s for row in points])
            steps = np.diff(times, prepend=times[0] - 0.1)
            mbps = np.array([row.bytes for row in points]) * 8 / 1e6 / np.maximum(steps, 1e-3)
            ax.plot(times, mbps, **numbered(place, name).kwargs(markers=False))
            rows += [
                [model, name, row.at_s, round(float(m), 3), row.drops]
                for row, m in zip(points, mbps, strict=True)
            ]
        mark(ax, events)
        # Room for the legend above the lines.
        ax.set(title=model, ylabel="Mbit/s", ylim=(0, 1.3 * ax.get_ylim()[1]), xlim=(0, None))
        ax.legend(loc="upper right")
    axes[-1].set_xlabel("since the load's start, s")
    return save(figure, path.parent, path.name, ["model", "link", "at_s", "mbps", "drops"], rows)


def _transfers(view: View, models: list[str], path: Path) -> list[Path]:
    """A bar a request: waiting and prefill, transfer, decode; in order of arrival."""
    height = 1.0 + 0.085 * max(min(K_MAX_BARS, len(first_requests(view, model))) for model in models)
    figure, axes = new_figure(1, len(models), height=height)
    rows: list[list[Any]] = []
    for ax, model in zip(axes, models, strict=True):
        every = sorted(first_requests(view, model), key=lambda row: row.sent_s)
        requests = every[:K_MAX_BARS]
        _, events = first_links_and_events(view, model)
        colour = numbered(1, "").colour
        for place, row in enumerate(requests):
            start, end = number(row, "transfer_start_s"), number(row, "transfer_end_s")
            done = row.sent_s + (row.e2e_s or 0.0)
            if start is not None and end is not None:
                ax.barh(place, max(0.0, start - row.sent_s), left=row.sent_s, color=K_WAITING, height=0.8)
                ax.barh(place, end - start, left=start, color=colour, height=0.8)
                ax.barh(place, max(0.0, done - end), left=end, color=K_DECODING, height=0.8)
            else:
                ax.barh(place, max(0.0, done - row.sent_s), left=row.sent_s, color=K_WAITING, height=0.8)
            if row.error:
                ax.plot([row.sent_s], [place], marker="x", color=K_EVENT)
            rows.append([model, row.id, row.prompt_tokens, row.sent_s, start, end, done, row.kv_bytes])
        mark(ax, events)
        ax.set(
            title=model if len(every) <= K_MAX_BARS else f"{model}: the first {K_MAX_BARS} of {len(every)}",
            xlabel="since the load's start, s",
            ylim=(len(requests) + 0.5, -1),
            xlim=(0, None),
        )
        ax.grid(axis="y", visible=False)
    axes[0].set_ylabel("requests, in order of arrival")
    for label, shade in (
        ("queue and prefill", K_WAITING),
        ("transfer (first byte to whole)", numbered(1, "").colour),
        ("decode", K_DECODING),
    ):
        axes[-1].barh(0, 0, color=shade, label=label)
    axes[-1].legend(loc="lower left")  # bars go from the upper left to the lower right
    header = [
        "model",
        "id",
        "prompt_tokens",
        "sent_s",
        "transfer_start_s",
        "transfer_end_s",
        "done_s",
        "kv_bytes",
    ]
    return save(figure, path.parent, path.name, header, rows)


def first_links_and_events(view: View, model: str) -> tuple[list[LinkRow], list[EventRow]]:
    """Links and events of the first repetition that this model has: one pass can be looked at, five can't."""
    for repetition in view.run.repetitions:
        links = [row for row in repetition.links if _is(row, view.part, model)]
        if links:
            events = [row for row in repetition.events if _is(row, view.part, model)]
            return links, [row for row in events if row.event not in K_QUIET_EVENTS]
    return [], []


def busiest_links(links: Sequence[LinkRow]) -> list[str]:
    """As many as a figure can tell apart, of those that carried anything to speak of; in the record's order,
    so that a link has one colour in all figures."""
    carried: dict[str, int] = {}
    for row in links:
        carried[row.link] = carried.get(row.link, 0) + row.bytes
    chosen = sorted(carried, key=lambda name: -carried[name])[:K_MOST_LINKS]
    least = K_LEAST_SHARE * max(carried.values(), default=0)
    return [name for name in carried if name in chosen and carried[name] >= least]


def first_requests(view: View, model: str) -> list[RequestRow]:
    for _, rows in View(view.run, view.part, model).repetitions():
        return rows
    return []


def _is(row: Any, part: str | None, model: str) -> bool:
    return (part is None or field(row, "part") == part) and field(row, "model") in (None, model)


def label_of(event: EventRow) -> str:
    """What an event is called where it is marked: its own word, and which of several kinds."""
    words = event.event.removesuffix("_end").replace("_", " ")
    kind, instance = field(event, "kind"), field(event, "instance")
    if kind is not None:
        words += f" {str(kind).replace('_', ' ')}"
    elif instance is not None:
        done = {"SIGSTOP": "freeze", "SIGCONT": "freeze"}.get(str(field(event, "signal")), words)
        words = f"{done} {instance}" + ("'s pump" if field(event, "what") == "pump" else "")
    change = field(event, "change")
    if isinstance(change, dict) and event.event.startswith("set_link"):
        values = [f"{name} {_short(value)}".strip() for name, value in change.items()]
        words = f"{field(event, 'link')} {', '.join(values)}".replace("_", " ")
    return words + (" end" if event.event.endswith("_end") else "")


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def mark(ax: Axes, events: list[EventRow], labels: bool = True) -> None:
    """What was done to the network or a server, at the time it truly happened."""
    for event in events:
        if field(event, "skipped"):
            continue
        ax.axvline(event.at_s, color=K_EVENT, linewidth=0.9, linestyle="--")
        if not labels:
            continue
        ax.annotate(
            label_of(event), (event.at_s, 1), xycoords=("data", "axes fraction"), fontsize=7,
            color=K_EVENT, rotation=90, va="top", ha="right",
        )  # fmt: skip
