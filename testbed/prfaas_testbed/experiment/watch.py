"""The network while a load runs: rows of its links, the emulator's own health, and where the bytes went."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prfaas.config.run import EventRow, LinkRow
from prfaas_testbed.experiment.fleet import K_PUMP_PORT, Fleet
from prfaas_testbed.experiment.sites import account, count_frames, counted_frames, pump_sent, pump_stats
from prfaas_testbed.network import Network, Sample

K_LAG_MS = 2.0  # the emulator's timer lag at p99 above which a repetition is void
K_SETTLE_S = 0.35  # samples are up to 0.1 s old, the last frames still on their way


def link_rows(samples: Sequence[Sample], zero_s: float) -> list[LinkRow]:
    """Differences between successive samples: a row a link and interval."""
    rows = []
    for before, after in itertools.pairwise(samples):
        for link, now in after.links.items():
            old = before.links.get(link)
            if old is None:
                continue
            rows.append(
                LinkRow(
                    at_s=round(after.at_s - zero_s, 3),
                    link=link,
                    direction=link,
                    bytes=now.bytes - old.bytes,
                    drops=(now.losses - old.losses) + (now.queue_drops - old.queue_drops),
                    backlog_bytes=now.backlog_bytes,
                )
            )
    return rows


def health(samples: Sequence[Sample]) -> dict[str, Any]:
    """Lag quantiles and unplanned drops between the first and the last sample."""
    lags = [lag for sample in samples for lag in sample.lags_ms]
    drops = 0
    if len(samples) > 1:
        first, last = samples[0].accidents, samples[-1].accidents
        drops = sum(last[name] - first.get(name, 0) for name in last)
    return {
        "lag_p50_ms": round(float(np.quantile(lags, 0.5)), 3) if lags else None,
        "lag_p99_ms": round(float(np.quantile(lags, 0.99)), 3) if lags else None,
        "lag_max_ms": round(max(lags), 3) if lags else None,
        "unplanned_drops": drops,
        "samples": len(samples),
    }


def spoilt(found: Mapping[str, Any]) -> str | None:
    """Why the emulator spoilt a repetition, or None."""
    lag_ms = found["lag_p99_ms"]
    if lag_ms is not None and lag_ms > K_LAG_MS:
        return f"the emulator's timer lag was {lag_ms:.1f} ms at p99 (limit {K_LAG_MS:g} ms)"
    if found["unplanned_drops"]:
        return f"{found['unplanned_drops']} packets were dropped that nobody planned to drop"
    return None


class Watch:
    """From `begin` to `end` around one repetition of one model."""

    def __init__(self, net: Network, fleet: Fleet) -> None:
        self._net, self._fleet = net, fleet
        self._before: dict[str, dict[str, Any]] = {}
        self.began_s = 0.0

    def begin(self) -> None:
        for site in self._net.sites.values():
            count_frames(site, K_PUMP_PORT)
        self._before = self._state()
        self.began_s = time.monotonic()

    def end(self, zero_s: float) -> tuple[list[LinkRow], list[EventRow], str | None]:
        """Link rows, the events `watch` and `accounting`, and why the repetition is void (None: valid)."""
        time.sleep(K_SETTLE_S)
        ended_s = time.monotonic()
        samples = self._net.samples(self.began_s, ended_s)
        at_s = round(ended_s - zero_s, 3)
        found = health(samples)
        events = [EventRow.model_validate({"at_s": at_s, "event": "watch", **found})]
        for site, after in self._state().items():
            row = account(self._before[site], after)
            events.append(EventRow.model_validate({"at_s": at_s, "event": "accounting", "site": site, **row}))
        return link_rows(samples, zero_s), events, spoilt(found)

    def _state(self) -> dict[str, dict[str, Any]]:
        """Of each site with a pump: its counters, its frames, and its outgoing links."""
        names = list(self._fleet.pumps)
        found_stats = pump_stats(
            [self._net.sites[name] for name in names], [self._fleet.pump_config(name) for name in names]
        )
        stats = {name: pump_sent(found) for name, found in zip(names, found_stats, strict=True)}
        time.sleep(K_SETTLE_S)
        sample = self._net.sample()
        found = {}
        for name, pump in stats.items():
            out = [counters for link, counters in sample.links.items() if link.startswith(f"{name}->")]
            found[name] = {
                "pump": pump,
                "frames": counted_frames(self._net.sites[name]),
                "wan_bytes": sum(counters.bytes for counters in out),
                "wan_packets": sum(counters.packets for counters in out),
                "wan_losses": sum(counters.losses + counters.queue_drops for counters in out),
            }
        return found
