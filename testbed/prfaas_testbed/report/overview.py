"""One picture of a run with the network's timeline under the system's, so that cause stands above effect."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prfaas.config.run import Run
from prfaas.figures import K_KINDS, new_figure, numbered, save
from prfaas_testbed.experiment.view import View
from prfaas_testbed.report.figures import (
    busiest_links,
    first_links_and_events,
    first_requests,
    label_of,
    mark,
)

K_BIN_S = 1.0


def draw_overview(
    run: Run,
    folder: Path,
    part: str | None,
    model: str,
    name: str,
    title: str = "",
    kinds: tuple[str, ...] = K_KINDS,
) -> list[Path]:
    """Three panels over one time axis: the links, requests open and failing, time to first token."""
    view = View(run, part)
    links, events = first_links_and_events(view, model)
    requests = [row for row in first_requests(view, model) if row.e2e_s is not None]
    if not links or not requests:
        return []
    figure, (network, system, ttft) = new_figure(3, 1, width=9.0, height=1.9, sharex=True)
    for place, link in enumerate(busiest_links(links)):
        points = [row for row in links if row.link == link]
        times = np.array([row.at_s for row in points])
        edges = np.arange(times.min(), times.max() + K_BIN_S, K_BIN_S)
        bits, _ = np.histogram(times, edges, weights=np.array([row.bytes * 8.0 for row in points]))
        network.stairs(bits / K_BIN_S / 1e6, edges, color=numbered(place, link).colour, label=link)
    network.set(
        ylabel="link, Mbit/s",
        ylim=(0, 1.3 * network.get_ylim()[1]),
        title=title or f"{part + ': ' if part else ''}{model}",
    )
    if network.get_legend_handles_labels()[0]:
        network.legend(loc="upper right", ncols=4)
    ends = sorted(edge for row in requests for edge in ((row.sent_s, 1), (row.sent_s + (row.e2e_s or 0), -1)))
    system.step([at for at, _ in ends], np.cumsum([step for _, step in ends]), where="post", color="#444444")
    system.set(ylabel="requests open", ylim=(0, None))
    ttft.plot(
        [row.sent_s for row in requests],
        [row.ttft_s or 0.0 for row in requests],
        **numbered(0, "").kwargs() | {"linestyle": ""},
    )
    ttft.set(ylabel="TTFT, s", ylim=(0, None), xlim=(0, None), xlabel="since the load's start, s")
    for ax in (network, system, ttft):
        mark(ax, events, labels=ax is network)
    rows = [[event.at_s, label_of(event)] for event in events]
    return save(figure, folder, name, ["at_s", "event"], rows, kinds)
