"""The links between sites as fluids: concurrent transfers, shared bottlenecks, round trips, loss, failures.

A *pipe* is all that one site sends to another; it runs over one or several directed links. A link's rate is
divided equally among the pipes that have something to send, and what a pipe can't use is given to the others
(max-min). Within a pipe the engine's own order of sending says each transfer's share; it is integrated
between events. A transfer's bytes become available in pieces, as prefill's chunks end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from prfaas.config.topology import Impairments, Topology
from prfaas.simulator.agenda import Agenda
from prfaas.simulator.flows import payload_share, ramp_bps, stream_ceiling_bps
from prfaas.transfer.order import SendOrder

K_STEP_S = 0.25  # shares are looked at again at least this often while several transfers compete
K_COLD_AFTER_S = math.inf  # the engine keeps idle streams warm: only the first use is cold
K_DONE_BYTES = 0.5  # a fluid leaves crumbs


class Transfer:
    """Bytes on their way. `on_landed(now)` is called when the last one is at the other end."""

    __slots__ = ("available", "deadline_s", "on_landed", "sent", "started_s", "total_bytes")

    def __init__(self, total_bytes: int, deadline_s: float, on_landed: Callable[[float], None]) -> None:
        self.total_bytes, self.deadline_s, self.on_landed = total_bytes, deadline_s, on_landed
        self.available = 0.0
        self.sent = 0.0
        self.started_s: float | None = None


@dataclass(slots=True)
class Link:
    """One directed link as it is now."""

    id: str
    state: Impairments
    cross_bps: float = 0.0
    """Taken by traffic that has a rate of its own (UDP)."""
    cross_streams: int = 0
    """Greedy streams of others, which take their share each."""

    @property
    def rate_bps(self) -> float:
        if self.state.down:
            return 0.0
        rate = math.inf if self.state.rate_mbps is None else self.state.rate_mbps * 1e6
        return max(0.0, rate - self.cross_bps)


class Pipe:
    """All transfers from one site to another."""

    def __init__(self, source: str, target: str, links: list[Link], streams: int) -> None:
        self.source, self.target, self.links, self.streams = source, target, links, streams
        self.order: SendOrder[Transfer] = SendOrder()
        self.transfers: dict[Transfer, None] = {}
        self.rates: dict[Transfer, float] = {}
        """Bytes a second of each transfer since `updated_s`."""
        self.updated_s = 0.0
        self.plan = 0
        self.busy_since_s: float | None = None
        self.idle_since_s = -math.inf
        self.ever_busy = False
        self.sent_bytes = 0.0

    @property
    def up(self) -> bool:
        return all(link.rate_bps > 0 for link in self.links)

    @property
    def delay_s(self) -> float:
        """One way."""
        return sum(link.state.delay_ms for link in self.links) / 1e3

    @property
    def backlog_bytes(self) -> float:
        return sum(one.available - one.sent for one in self.transfers)

    def eligible(self) -> list[Transfer]:
        return [one for one in self.transfers if one.available - one.sent > K_DONE_BYTES]


class Network:
    """All pipes of a topology, on the agenda's time."""

    def __init__(
        self,
        topology: Topology,
        agenda: Agenda,
        *,
        control: Literal["cubic", "bbr"] = "bbr",
        streams: int = 8,
        emulated: bool = False,
    ) -> None:
        states = topology.emulated() if emulated else topology.directed()
        self.links: dict[str, Link] = {name: Link(name, state) for name, state in states.items()}
        self.control: Literal["cubic", "bbr"] = control
        self._agenda = agenda
        self.pipes: dict[tuple[str, str], Pipe] = {}
        for a, b in topology.site_pairs():
            path = [self.links[link_id] for link_id in topology.path(a, b)]
            self.pipes[a, b] = Pipe(a, b, path, streams)
        self._active: dict[Pipe, None] = {}
        self.on_activity: Callable[[Pipe, float], None] | None = None
        """Called when an idle pipe gets something to send."""

    def rtt_s(self, a: str, b: str) -> float:
        return self.pipes[a, b].delay_s + self.pipes[b, a].delay_s

    # Transfers.

    def start(self, source: str, target: str, transfer: Transfer, now: float) -> None:
        """Announce a transfer; its bytes come by `supply`."""
        self.pipes[source, target].transfers[transfer] = None

    def supply(
        self, source: str, target: str, transfer: Transfer, available_bytes: float, now: float
    ) -> None:
        """So many of its bytes, in all, may leave now."""
        pipe = self.pipes[source, target]
        if transfer not in pipe.transfers:
            return
        self._settle(pipe, now)
        more = min(float(transfer.total_bytes), available_bytes) - transfer.available
        if more <= 0:
            if transfer.total_bytes <= 0:
                self._land(pipe, transfer, now)
            return
        transfer.available += more
        if transfer.started_s is None:
            transfer.started_s = now
        if transfer not in pipe.order:
            pipe.order.add(
                transfer, max(1, math.ceil(transfer.available - transfer.sent)), transfer.deadline_s
            )
        else:
            pipe.order.add_bytes(transfer, math.ceil(more))
        if pipe not in self._active:
            self._active[pipe] = None
            if not pipe.ever_busy or now - pipe.idle_since_s > K_COLD_AFTER_S:
                pipe.busy_since_s = now
            pipe.ever_busy = True
            if self.on_activity is not None:
                self.on_activity(pipe, now)
            self._replan_all(now)
        else:
            self._replan(pipe, now)

    def drop(self, source: str, target: str, transfer: Transfer, now: float) -> None:
        """Forget it; its bytes make room for others. Harmless when it has landed."""
        pipe = self.pipes[source, target]
        if transfer not in pipe.transfers:
            return
        self._settle(pipe, now)
        del pipe.transfers[transfer]
        pipe.order.remove(transfer)
        self._replan(pipe, now)

    # Change.

    def changed(self, now: float) -> None:
        """Links are no longer as they were: settle at the old rates first, by `before_change`."""
        self._replan_all(now)

    def before_change(self, now: float) -> None:
        for pipe in list(self._active):
            self._settle(pipe, now)

    def settle(self, pipe: Pipe, now: float) -> None:
        """Bring the pipe's counters up to `now`."""
        self._settle(pipe, now)

    # How it works.

    def _settle(self, pipe: Pipe, now: float) -> None:
        """Move what has moved since the last look."""
        passed_s = now - pipe.updated_s
        pipe.updated_s = now
        if passed_s <= 0:
            return
        for transfer, rate in pipe.rates.items():
            if transfer not in pipe.transfers:
                continue
            moved = min(rate * passed_s, transfer.available - transfer.sent)
            whole = math.floor(transfer.sent + moved) - math.floor(transfer.sent)
            transfer.sent += moved
            pipe.sent_bytes += moved
            if transfer in pipe.order and whole > 0:
                pipe.order.sent(now, transfer, whole, [transfer])

    def _capacities(self, now: float) -> dict[Pipe, float]:
        """Bytes a second of payload for each active pipe: max-min over the links, ceilings applied."""
        wants = {pipe: self._ceiling_bps(pipe, now) for pipe in self._active}
        got: dict[Pipe, float] = {}
        left: dict[str, float] = {}
        for pipe in wants:
            for link in pipe.links:
                left[link.id] = link.rate_bps * payload_share()
        open_pipes = dict(wants)
        while open_pipes:
            # Greedy streams of others count like pipes of their size.
            fair: dict[str, float] = {}
            for link_id in {link.id for pipe in open_pipes for link in pipe.links}:
                weight = sum(1.0 for pipe in open_pipes if any(link.id == link_id for link in pipe.links))
                weight += self.links[link_id].cross_streams / max(1, next(iter(open_pipes)).streams)
                fair[link_id] = left[link_id] / weight
            limits = {
                pipe: min(want, *(fair[link.id] for link in pipe.links)) for pipe, want in open_pipes.items()
            }
            pipe = min(limits, key=lambda one: limits[one])
            got[pipe] = limits[pipe] / 8
            for link in pipe.links:
                left[link.id] = max(0.0, left[link.id] - limits[pipe])
            del open_pipes[pipe]
        return got

    def _ceiling_bps(self, pipe: Pipe, now: float) -> float:
        rtt_s = self.rtt_s(pipe.source, pipe.target)
        capacity = min(link.rate_bps for link in pipe.links) * payload_share()
        keep = math.prod(1 - link.state.mean_loss for link in pipe.links)
        per_stream = stream_ceiling_bps(rtt_s, 1 - keep, self.control, capacity)
        ceiling = min(capacity, per_stream * pipe.streams)
        if pipe.busy_since_s is not None:
            ramp = ramp_bps(rtt_s, pipe.streams, now - pipe.busy_since_s)
            if ramp >= ceiling:
                pipe.busy_since_s = None
            else:
                ceiling = ramp
        return ceiling

    def _replan_all(self, now: float) -> None:
        for pipe in list(self._active):
            self._settle(pipe, now)
        if len(self._active) == 1:
            self._replan(next(iter(self._active)), now)
            return
        capacities = self._capacities(now)
        for pipe in list(self._active):
            self._replan(pipe, now, capacities.get(pipe))

    def _replan(self, pipe: Pipe, now: float, capacity: float | None = None) -> None:
        """Land what has arrived, share the rate anew, and say when to look again. `pipe` is settled."""
        for transfer in [one for one in pipe.transfers if one.total_bytes - one.sent <= K_DONE_BYTES]:
            self._land(pipe, transfer, now)
        eligible = pipe.eligible()
        pipe.plan += 1
        if not eligible:
            pipe.rates = {}
            if pipe in self._active:
                del self._active[pipe]
                pipe.idle_since_s = now
                if self._active:
                    self._replan_all(now)
            return
        if capacity is None:
            capacity = self._capacities(now).get(pipe, 0.0)
        for one in eligible:
            if one not in pipe.order:  # whole bytes ran out a crumb before the fluid did
                pipe.order.add(one, 1, one.deadline_s)
        shares: Mapping[Transfer, float]
        shares = {eligible[0]: 1.0} if len(eligible) == 1 else pipe.order.shares(now, eligible)
        pipe.rates = {one: capacity * shares.get(one, 0.0) for one in eligible}
        if capacity <= 0:
            return  # until something changes
        wait_s = min((one.available - one.sent) / rate for one, rate in pipe.rates.items() if rate > 0)
        if len(eligible) > 1:
            wait_s = min(wait_s, K_STEP_S)
        if pipe.busy_since_s is not None:
            wait_s = min(wait_s, max(1e-4, self.rtt_s(pipe.source, pipe.target)))
        plan = pipe.plan
        self._agenda.at(now + max(wait_s, 1e-9), lambda at_s: self._look(pipe, plan, at_s))

    def _look(self, pipe: Pipe, plan: int, now: float) -> None:
        if plan == pipe.plan:
            self._settle(pipe, now)
            self._replan(pipe, now)

    def _land(self, pipe: Pipe, transfer: Transfer, now: float) -> None:
        del pipe.transfers[transfer]
        pipe.order.remove(transfer)
        self._agenda.at(now + pipe.delay_s, transfer.on_landed)
