"""The links between sites as fluids: concurrent transfers, shared bottlenecks, round trips, loss, failures.

A *pipe* is all that one site sends to another; it runs over one or several directed links. A link's rate is
divided equally among the pipes that have something to send, and what a pipe can't use is given to the others
(max-min). Within a pipe the engine's own order of sending says each transfer's share; it is integrated
between events. A transfer's bytes become available in pieces, as prefill's chunks end.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterable
from functools import partial
from operator import attrgetter
from typing import Literal

from prfaas.config.topology import Topology
from prfaas.model.values import value
from prfaas.simulator.agenda import Agenda
from prfaas.simulator.flows import (
    answered_late_s,
    payload_share,
    ramp_bps,
    repeated_late_s,
    standing_queue,
    stream_ceiling_bps,
)
from prfaas.simulator.outages import resumes_after_s
from prfaas.simulator.pipes import Link, Pipe, Transfer
from prfaas.transfer.streams import K_FAR_RATE_DRIVEN

K_STEP_S = 0.25  # shares are looked at again at least this often while several transfers compete
K_COLD_AFTER_S = math.inf  # the engine keeps idle streams warm: only the first use is cold
K_DONE_BYTES = 0.5  # a fluid leaves crumbs

K_FULL_SHARE = 0.9  # of a link that one pipe must have to itself for its queue to be this pipe's

_serial, _rate_of = attrgetter("serial"), attrgetter("rate_bps")


@value
class Seen:
    """Of a pipe, as its streams find it."""

    rtt_s: float
    loss: float
    """Share of packets."""


class Network:
    """All pipes of a topology, on the agenda's time."""

    def __init__(
        self,
        topology: Topology,
        agenda: Agenda,
        *,
        control: Literal["cubic", "bbr"] = "bbr",
        streams: int = K_FAR_RATE_DRIVEN,
        emulated: bool = False,
        pairs: Iterable[tuple[str, str]] | None = None,
    ) -> None:
        states = topology.emulated() if emulated else topology.directed()
        self.links: dict[str, Link] = {name: Link(name, state) for name, state in states.items()}
        self.control: Literal["cubic", "bbr"] = control
        self._agenda = agenda
        self.pipes: dict[tuple[str, str], Pipe] = {}
        for a, b in topology.site_pairs() if pairs is None else pairs:
            path = [self.links[link_id] for link_id in topology.path(a, b)]
            self.pipes[a, b] = Pipe(a, b, path, streams)
        self._active: dict[Pipe, None] = {}
        self.on_activity: Callable[[Pipe, float], None] | None = None
        """Called when an idle pipe gets something to send, or any has lost a link."""

    def rtt_s(self, a: str, b: str) -> float:
        there = self.pipes[a, b]
        if there.rtt_s is None:
            there.rtt_s = there.delay_s + self.pipes.get((b, a), there).delay_s
        return there.rtt_s

    def seen(self, pipe: Pipe, now: float) -> Seen:
        """What its streams measure now: with the queue that they make before the narrowest link."""
        rtt_s, loss = self.rtt_s(pipe.source, pipe.target), pipe.loss
        narrowest = min(pipe.links, key=_rate_of)
        rate = narrowest.rate_bps / 8
        limited = self.control == "bbr" and pipe in self._active and rtt_s > 0 and rate < math.inf
        if limited and pipe.capacity > K_FULL_SHARE * rate * payload_share() > 0:
            busy_s = now - pipe.active_since_s
            queue_bytes, dropped = standing_queue(
                rate, rtt_s, pipe.streams, narrowest.state.buffer_bytes, busy_s
            )
            rtt_s += queue_bytes / rate
            loss = 1 - (1 - loss) * (1 - dropped)
        return Seen(rtt_s, loss)

    def answer_s(self, source: str, target: str, now: float) -> float:
        """Until `target` has the sender's answer, once the last byte is there and the sender heard that."""
        seen = self.seen(self.pipes[source, target], now)
        return seen.rtt_s + answered_late_s(seen.rtt_s, seen.loss)

    # Transfers.

    def start(self, source: str, target: str, transfer: Transfer, now: float) -> None:
        """Announce a transfer; its bytes come by `supply`."""
        self.pipes[source, target].announce(transfer)

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
            insort(pipe.begun, transfer, key=_serial)
        pipe.join(transfer)
        if transfer not in pipe.order:
            pipe.order.add(
                transfer, max(1, math.ceil(transfer.available - transfer.sent)), transfer.deadline_s
            )
        else:
            pipe.order.add_bytes(transfer, math.ceil(more))
        if pipe not in self._active:
            self._activate(pipe)
            self._heed_outage(pipe, now)
            if not pipe.ever_busy or now - pipe.idle_since_s > K_COLD_AFTER_S:
                pipe.busy_since_s = now
            pipe.ever_busy = True
            if self.on_activity is not None:
                self.on_activity(pipe, now)
            self._replan_around(pipe, now)
        else:
            self._replan(pipe, now)

    def drop(self, source: str, target: str, transfer: Transfer, now: float) -> None:
        """Forget it; its bytes make room for others. Harmless when it has landed."""
        pipe = self.pipes[source, target]
        if transfer not in pipe.transfers:
            return
        self._settle(pipe, now)
        pipe.leave(transfer)
        self._replan(pipe, now)

    # Change.

    def changed(self, now: float) -> None:
        """Links are no longer as they were: settle at the old rates first, by `before_change`."""
        for pipe in self.pipes.values():
            pipe.forget()
            self._heed_outage(pipe, now)
        for pipe in list(self._active):
            if pipe in self._active:
                self._replan_around(pipe, now)

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
            sent = transfer.sent
            moved, most = rate * passed_s, transfer.available - sent
            if moved > most:
                moved = most
            transfer.sent = after = sent + moved
            pipe.sent_bytes += moved
            whole = int(after) - int(sent)
            if whole > 0 and transfer in pipe.order:
                pipe.order.sent(now, transfer, whole, (transfer,))

    def _together(self, pipe: Pipe) -> list[Pipe]:
        """The active pipes whose rates depend on this one's: those that share a link, and theirs in turn."""
        found, to_see = {pipe: None}, [pipe]
        while to_see:
            for link in to_see.pop().links:
                for other in link.users:
                    if other not in found:
                        found[other] = None
                        to_see.append(other)
        return list(found)

    def _capacities(self, pipes: list[Pipe], now: float) -> dict[Pipe, float]:
        """Bytes a second of payload for pipes that share links with no others: max-min, with ceilings.

        Progressive filling: the pipe that can have least gets that, and what is left goes to the others.
        """
        if len(pipes) == 1:
            return {pipes[0]: self._capacity(pipes[0], now)}
        wants = {pipe: self._ceiling_bps(pipe, now) for pipe in pipes}
        return self._shared(wants, pipes)

    def _capacity(self, pipe: Pipe, now: float) -> float:
        """The same of one pipe with its links to itself, but for others' streams."""
        want_bps = self._ceiling_bps(pipe, now)
        for link in pipe.links:
            if link.cross_streams:
                return self._shared({pipe: want_bps}, [pipe])[pipe]
        return want_bps / 8

    def _shared(self, wants: dict[Pipe, float], pipes: list[Pipe]) -> dict[Pipe, float]:
        left: dict[str, float] = {}
        weight: dict[str, float] = {}
        for pipe in pipes:
            for link in pipe.links:
                left[link.id] = link.rate_bps * payload_share()
                # Greedy streams of others count like pipes of their size.
                weight.setdefault(link.id, link.cross_streams / max(1, pipe.streams))
                weight[link.id] += 1.0
        got: dict[Pipe, float] = {}
        while wants:
            least, least_bps = None, math.inf
            for pipe, want in wants.items():
                limit = min(want, *[left[link.id] / weight[link.id] for link in pipe.links])
                if limit < least_bps or least is None:
                    least, least_bps = pipe, limit
            assert least is not None  # wants isn't empty
            got[least] = least_bps / 8
            del wants[least]
            for link in least.links:
                left[link.id] = max(0.0, left[link.id] - least_bps)
                weight[link.id] -= 1.0
        return got

    def _ceiling_bps(self, pipe: Pipe, now: float) -> float:
        if pipe.silent_since_s is not None:
            return 0.0
        ceiling = pipe.full_bps
        if ceiling is None:
            rtt_s = self.rtt_s(pipe.source, pipe.target)
            capacity = min(link.rate_bps for link in pipe.links) * payload_share()
            per_stream = stream_ceiling_bps(rtt_s, pipe.loss, self.control, capacity)
            ceiling = pipe.full_bps = min(capacity, per_stream * pipe.streams)
        if pipe.busy_since_s is not None:
            ramp = ramp_bps(self.rtt_s(pipe.source, pipe.target), pipe.cold_streams, now - pipe.busy_since_s)
            if ramp >= ceiling:
                pipe.busy_since_s, pipe.active_since_s = None, now
            else:
                ceiling = ramp
        return ceiling

    def _heed_outage(self, pipe: Pipe, now: float) -> None:
        """Its links may have died or come back, or it may have begun to send while they are dead."""
        if not pipe.up:
            pipe.resumes_s = math.inf
            # What was under way a round trip ago arrives, but nobody hears of it.
            under_way = pipe in self._active or now - pipe.idle_since_s < self.rtt_s(pipe.source, pipe.target)
            if pipe.silent_since_s is None and under_way:
                pipe.silent_since_s = now
            if self.on_activity is not None:
                self.on_activity(pipe, now)  # a pump probes a link that rests
        elif pipe.silent_since_s is not None and pipe.resumes_s == math.inf:
            silent_s = now - pipe.silent_since_s
            after_s, anew = resumes_after_s(silent_s, self.rtt_s(pipe.source, pipe.target))
            pipe.resumes_s = resumes_s = pipe.silent_since_s + after_s
            self._agenda.at(resumes_s, partial(self._resume, pipe, resumes_s, anew))

    def _resume(self, pipe: Pipe, due_s: float, anew: bool, now: float) -> None:
        """Its streams find the link back, unless that has died again meanwhile."""
        if pipe.silent_since_s is None or pipe.resumes_s != due_s:
            return
        pipe.silent_since_s, pipe.active_since_s = None, now
        if anew:
            # The others are dialled once the first has got through, and are behind it all the way.
            pipe.busy_since_s, pipe.cold_streams = now, 1
        if pipe in self._active:
            self._replan_around(pipe, now)

    def _activate(self, pipe: Pipe) -> None:
        self._active[pipe] = None
        pipe.active_since_s = self._agenda.now
        for link in pipe.links:
            link.users[pipe] = None

    def _rest(self, pipe: Pipe, now: float) -> None:
        """It has nothing to send for now."""
        del self._active[pipe]
        for link in pipe.links:
            del link.users[pipe]
        pipe.idle_since_s = now

    def _replan_around(self, pipe: Pipe, now: float) -> None:
        """Rates anew for all whose rates depend on this pipe's."""
        active, alone = pipe in self._active, True
        for link in pipe.links:
            users = link.users
            if users and (len(users) > 1 or pipe not in users):
                alone = False
                break
        if alone:
            if active:
                if pipe.updated_s < now:
                    self._settle(pipe, now)
                self._replan(pipe, now, self._capacity(pipe, now))
            return
        others = self._together(pipe) if active else []
        for link in pipe.links:
            for other in link.users:
                if other not in others:
                    others += [one for one in self._together(other) if one not in others]
        for one in others:
            self._settle(one, now)
        capacities = self._capacities(others, now)
        for one in others:
            if one is pipe or capacities[one] != one.capacity:
                self._replan(one, now, capacities[one])

    def _replan(self, pipe: Pipe, now: float, capacity: float | None = None) -> None:
        """Land what has arrived, share the rate anew, and say when to look again. `pipe` is settled."""
        eligible, landed = [], []
        for one in pipe.rates:
            if one.available - one.sent > K_DONE_BYTES:
                eligible.append(one)
            elif one.total_bytes - one.sent <= K_DONE_BYTES:
                landed.append(one)
        for one in landed:
            self._land(pipe, one, now)
        pipe.plan = plan = pipe.plan + 1
        if not eligible:
            pipe.rates = {}
            if pipe in self._active:
                self._rest(pipe, now)
                for link in pipe.links:
                    if link.users:
                        self._replan_around(pipe, now)
                        break
            return
        if capacity is None:
            if pipe.busy_since_s is not None:
                # Gathering speed: what it can take changes with time.
                capacity = self._capacities(self._together(pipe), now)[pipe]
            else:
                capacity = pipe.capacity
        pipe.capacity = capacity
        order = pipe.order
        for one in eligible:
            if one not in order:  # whole bytes ran out a crumb before the fluid did
                order.add(one, 1, one.deadline_s)
        if len(eligible) == 1:
            pipe.rates = {eligible[0]: capacity}
            wait_s = math.inf
        else:
            shares = order.shares(now, eligible)
            pipe.rates = {one: capacity * shares[one] for one in eligible}
            wait_s = K_STEP_S
        if capacity <= 0:
            return  # until something changes
        for one, rate in pipe.rates.items():
            if rate > 0:
                end_s = (one.available - one.sent) / rate
                if end_s < wait_s:
                    wait_s = end_s
        if pipe.busy_since_s is not None:
            wait_s = min(wait_s, max(1e-4, self.rtt_s(pipe.source, pipe.target)))
        self._agenda.at(now + (wait_s if wait_s > 1e-9 else 1e-9), partial(self._look, pipe, plan))

    def _look(self, pipe: Pipe, plan: int, now: float) -> None:
        if plan == pipe.plan:
            self._settle(pipe, now)
            self._replan(pipe, now)

    def _land(self, pipe: Pipe, transfer: Transfer, now: float) -> None:
        pipe.leave(transfer)
        seen = self.seen(pipe, now)
        on_its_way_s = pipe.delay_s
        if seen.loss > 0:
            on_its_way_s += repeated_late_s(seen.rtt_s, seen.loss, transfer.total_bytes, pipe.capacity)
        self._agenda.at(now + on_its_way_s, transfer.on_landed)
