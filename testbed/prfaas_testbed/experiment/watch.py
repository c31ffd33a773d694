"""The network while a load runs: rows of its links, the emulator's own health, and where the bytes went."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prfaas.config.run import EventRow, LinkRow
from prfaas_testbed.experiment import crashes
from prfaas_testbed.experiment.cost import Spent, cost_rows, spent
from prfaas_testbed.experiment.fleet import K_PUMP_PORT, Fleet
from prfaas_testbed.experiment.sites import account, frames_of, least_rtt_ms, pump_sent, pump_stats

if TYPE_CHECKING:
    from prfaas_testbed.network import Network, Sample, Watch

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


def in_clear(net: Network, fleet: Fleet, site: str) -> int:
    """Connections of the site to others that aren't the pumps': SGLang's own bootstrap and control, where
    they don't go by the pumps. HTTP to a server counts only where that was to go by them too.
    """
    others = {place.address for name, place in net.sites.items() if name != site}
    known = {K_PUMP_PORT}
    if not fleet.experiment.transfer.http_by_pump:
        known |= {server.port for server in fleet.servers}
    return sum(c.peer in others and not {c.local_port, c.peer_port} & known for c in net.connections(site))


class Observer:
    """From `begin` to `end` around one repetition of one model."""

    def __init__(self, net: Network, fleet: Fleet) -> None:
        self._net, self._fleet = net, fleet
        self._before: dict[str, dict[str, Any]] = {}
        self._watch: Watch | None = None
        self._spent: dict[str, Spent] = {}
        self.began_s = 0.0

    def begin(self) -> None:
        self._net.count_ports({"pump": [K_PUMP_PORT]})
        self._before = self._state()
        self._spent = spent(self._fleet)
        self.began_s = time.monotonic()
        self._watch = self._net.watch()

    def end(self, zero_s: float) -> tuple[list[LinkRow], list[EventRow], str | None]:
        """Link rows; events `watch`, `cost` and `accounting`; why the repetition is void (None: valid).
        Raises PrfaasError where a program crashed."""
        assert self._watch is not None
        time.sleep(K_SETTLE_S)
        crashes.require_none(self._fleet)
        ended_s = time.monotonic()
        costs = cost_rows(self._spent, spent(self._fleet), ended_s - self.began_s, round(ended_s - zero_s, 3))
        health = self._watch.verdict()
        samples = self._net.samples(self.began_s, ended_s)
        at_s = round(ended_s - zero_s, 3)
        row = {**health.as_row(), "unplanned_drops": sum(health.unplanned_drops.values())}
        events = [EventRow.model_validate({"at_s": at_s, "event": "watch", **row})]
        events += costs
        for site, after in self._state().items():
            row = account(self._before[site], after)
            row |= {name: after[name] for name in ("min_rtt_ms", "forwarded", "in_clear")}
            events.append(EventRow.model_validate({"at_s": at_s, "event": "accounting", "site": site, **row}))
        return link_rows(samples, zero_s), events, "; ".join(health.reasons) or None

    def _state(self) -> dict[str, dict[str, Any]]:
        """Of each site with a pump: its counters, its frames, and its outgoing links."""
        names = list(self._fleet.pumps)
        found_stats = pump_stats(
            [self._net.sites[name] for name in names], [self._fleet.pump_config(name) for name in names]
        )
        stats = {name: pump_sent(found) for name, found in zip(names, found_stats, strict=True)}
        rtts = {name: least_rtt_ms(found) for name, found in zip(names, found_stats, strict=True)}
        forwarded = {
            name: int(found["forwards"]["connections"])
            for name, found in zip(names, found_stats, strict=True)
        }
        time.sleep(K_SETTLE_S)
        sample = self._net.sample()
        found = {}
        for name, pump in stats.items():
            out = [counters for link, counters in sample.links.items() if link.startswith(f"{name}->")]
            found[name] = {
                "pump": pump,
                "min_rtt_ms": rtts[name],
                "forwarded": forwarded[name],
                "in_clear": in_clear(self._net, self._fleet, name),
                "frames": frames_of(self._net, name),
                "wan_bytes": sum(counters.bytes for counters in out),
                "wan_packets": sum(counters.packets for counters in out),
                "wan_losses": sum(counters.losses + counters.queue_drops for counters in out),
            }
        return found
