"""Asks the policy where a request goes, and turns its answer into servers.

The policy sees a snapshot (servers' loads, links' estimates, prefixes); what it decides, and how that ended,
is kept for /decisions, the event log and its own hooks. Not thread-safe: all of it runs on the event loop.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Protocol

from prfaas.config.router import CostFile, RouterConfig
from prfaas.model.decisions import Action, Decision
from prfaas.model.ids import ModelId, SiteId
from prfaas.model.observations import RequestView, SiteObservation, Snapshot
from prfaas.router.attempt import AttemptFailed, FailureKind, Route
from prfaas.router.blame import blame_servers, is_decodes_alone, judge_servers, least_blamed, tells_of_link
from prfaas.router.errors import NoPath, Overloaded
from prfaas.router.fleet import ServerHandle, ServerPool, least_loaded, least_running
from prfaas.router.holding import HoldingPen, Place
from prfaas.router.links import LinkBook
from prfaas.router.ticket import Record, Ticket
from prfaas.router.tokens import Prompt
from prfaas.routing import CostProfile, Fleet, Policy, create_policy

K_LOCAL_FROM = 2
"""Attempt (counted from 0) from which only sites that also decode may prefill."""
K_HOLD_STEP_S = 0.5
"""Longest time between two questions for a held request."""
K_UNCALLED_S = 10.0
"""The same for one that the policy recalls itself."""
K_PLANNED_SHARE = 0.5
"""Share of `retry.total_s` after which it is sent whatever its turn: its attempts need the rest."""


class Prefixes(Protocol):
    """Who has which prefix."""

    def cached_tokens(self, model: ModelId, prompt: Prompt) -> Mapping[str, int]:
        """Usable prefix by server name."""
        ...


class NoPrefixes:
    def cached_tokens(self, model: ModelId, prompt: Prompt) -> Mapping[str, int]:
        return {}


class Scheduler:
    """The deciding half of the router."""

    def __init__(
        self,
        config: RouterConfig,
        servers: ServerPool,
        links: LinkBook,
        *,
        costs: Callable[[CostFile], CostProfile],
        prefixes: Prefixes | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        on_record: Callable[[Record], None] = lambda record: None,
        on_decided: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._servers, self._links = servers, links
        self._costs = costs
        self._prefixes = prefixes or NoPrefixes()
        self._clock, self._wall_clock = clock, wall_clock
        self._on_record, self._on_decided = on_record, on_decided
        self.pen = HoldingPen()
        self.records: deque[Record] = deque(maxlen=0)
        self.policy: Policy
        self._made_of: object = None
        self._config = config
        self.apply(config)

    def apply(self, config: RouterConfig) -> None:
        """Take over a configuration. The policy is made anew only when what it depends on has changed."""
        fleet = self._fleet(config)
        made_of = (config.policy, dict(fleet.profiles), fleet.local_sites, fleet.movable)
        if made_of != self._made_of:
            self.policy = create_policy(config.policy, fleet)
            self._made_of = made_of
            self.pen.call_all()  # what the old one had planned for them is no more
        if self.records.maxlen != config.logs.decisions:
            self.records = deque(self.records, maxlen=config.logs.decisions)
        self._config = config
        filling = {site for site, server in config.servers() if server.role != "decode"}
        # Without prefill at home there is no local way to fall back to.
        local = filling & config.local_sites
        self._remote_sites = {site.name for site in config.sites} - config.local_sites if local else set()
        self.pen.wake()

    def _fleet(self, config: RouterConfig) -> Fleet:
        profiles: dict[tuple[str, str], CostProfile] = {}
        for site in config.sites:
            profiles[site.name, ""] = self._costs(site.cost)
            for model, cost in site.costs.items():
                profiles[site.name, model] = self._costs(cost)
        return Fleet(profiles=profiles, local_sites=config.local_sites, movable=config.movable)

    def snapshot(self, model: ModelId, without: Collection[str], now: float) -> Snapshot:
        """What is known now, of servers that serve `model` and aren't among `without`."""
        max_age_s = self._config.loads.max_age_s
        sites = {}
        for site, handles in self._servers.serving(model):
            seen = [one.observe(now, max_age_s) for one in handles if one.name not in without]
            sites[site] = SiteObservation.of(site, seen, now)
        return Snapshot(now=now, sites=sites, links=self._links.estimates(now))

    async def route(self, ticket: Ticket) -> Route:
        """Where the next attempt goes, once the policy doesn't hold it. Raises Overloaded or NoPath."""
        ticket.cached = self._prefixes.cached_tokens(ticket.model, ticket.prompt)
        place: Place | None = None
        with ExitStack() as stay:
            while True:
                now = self._clock()
                view = self._view(ticket)
                snapshot = self.snapshot(ticket.model, ticket.failed_servers, now)
                decision = self.policy.decide(view, snapshot, now)
                self._on_decided(self._clock() - now)
                order = _order(decision, ticket)
                thing = (ticket.model, decision.prefill_site)
                waited = (now - ticket.arrived_s) / self._config.retry.total_s
                full = place is None and self.pen.held >= self._config.limits.max_held
                if decision.planned and (full or waited >= K_PLANNED_SHARE):
                    # It can wait at its server as well: nobody is turned away for a plan.
                    decision = replace(decision, action=Action.DISPATCH)
                # A retry doesn't queue again: it has waited, and paid with a failure.
                behind = ticket.attempt == 0 and self.pen.ahead(thing, order, place)
                if decision.action is Action.DISPATCH and not behind:
                    route = self._servers_for(ticket, decision, now)
                    if route is not None:
                        self._dispatched(ticket, view, decision, route, now)
                        if place is not None:
                            ticket.held_s = now - place.since_s
                            self.pen.wake()
                        return route
                    # The policy's picture is older than ours: not this site again.
                    site = decision.prefill_site
                    if site is None or site in ticket.failed_sites:
                        raise NoPath("No server can take it now.", retry_after_s=self._retry_after_s)
                    ticket.failed_sites.add(site)
                    continue
                if decision.action not in (Action.HOLD, Action.DISPATCH):
                    ticket.decision = decision
                    self._record(ticket, decision, None)
                    raise self._refusal(decision)
                if waited >= 1:
                    long = f"Held for too long: {decision.reason}"
                    raise Overloaded(long, retry_after_s=self._retry_after_s)
                if place is None:
                    if full:
                        raise Overloaded("Too many requests are waiting.", retry_after_s=self._retry_after_s)
                    place = stay.enter_context(self.pen.place(now))
                    self._record(ticket, decision, None)
                if decision.planned:
                    place.leave()  # the policy knows its turn
                    self._under_policy(ticket)
                    self.policy.on_hold(request=view, decision=decision, now=now)
                    wait_s = min(K_UNCALLED_S, (K_PLANNED_SHARE - waited) * self._config.retry.total_s)
                    await self.pen.until_called(ticket.request_id, wait_s, self.policy, self._clock)
                    continue
                place.at(thing, order)
                wait_s = K_HOLD_STEP_S
                if decision.until_s is not None:
                    wait_s = min(wait_s, max(0.001, decision.until_s - now))
                await self.pen.wait(order, wait_s)

    def _freed(self) -> None:
        """An instance or a link has something less to do: whoever waited for that asks again."""
        self.pen.wake()
        self.pen.recall(self.policy, self._clock)

    def _under_policy(self, ticket: Ticket) -> None:
        """The request is the present policy's from now on: one that held it before a reload forgets it."""
        if ticket.policy is not None and ticket.policy is not self.policy:
            ticket.policy.on_finished(request=ticket.request_id, now=self._clock())
        ticket.policy = self.policy

    def _refusal(self, decision: Decision) -> Exception:
        retry_after_s = decision.retry_after_s or self._retry_after_s
        if decision.action is Action.SHED:
            return Overloaded(f"Not served now: {decision.reason}", code="shed", retry_after_s=retry_after_s)
        return NoPath(f"No path: {decision.reason}", retry_after_s=retry_after_s)

    @property
    def _retry_after_s(self) -> float:
        return self._config.limits.retry_after_s

    def _view(self, ticket: Ticket) -> RequestView:
        by_site: dict[str, int] = {}
        decode_by_site: dict[str, int] = {}
        for name, tokens in ticket.cached.items():
            handle = self._servers.get(name)
            if handle is not None and name not in ticket.failed_servers:
                sites = decode_by_site if handle.role == "decode" else by_site
                sites[handle.site] = max(sites.get(handle.site, 0), tokens)
        return RequestView(
            request=ticket.request_id,
            prompt_tokens=ticket.prompt.tokens,
            arrived_s=ticket.arrived_s,
            model=ticket.model,
            home=self._config.home,
            cached_tokens=by_site,
            decode_cached_tokens=decode_by_site,
            # Of a server that isn't heard nothing may be hoped, once another is known to have something.
            instance_cached_tokens={one.name: ticket.cached.get(one.name, 0) for one in self._servers}
            if ticket.cached
            else {},
            output_tokens=ticket.output_tokens,
            tenant=ticket.tenant,
            slo_class=ticket.slo_class,
            deadline_s=ticket.deadline_s,
            block_hashes=ticket.prompt.block_hashes,
            excluded=self._excluded(ticket),
            attempt=ticket.attempt,
        )

    def _excluded(self, ticket: Ticket) -> frozenset[SiteId]:
        """Sites not to be tried again; from the third attempt on, none but those that also decode."""
        if ticket.attempt < K_LOCAL_FROM or not self._config.local_sites:
            return frozenset(ticket.failed_sites)
        return frozenset(ticket.failed_sites | self._remote_sites)

    def _usable(self, ticket: Ticket, site: SiteId, now: float, *, decode: bool) -> list[ServerHandle]:
        refused = "prefill" if decode else "decode"
        return [
            handle
            for handle in self._servers
            if handle.site == site
            and handle.role != refused
            and handle.name not in ticket.failed_servers
            and handle.serves(ticket.model)
            and handle.up(now)
        ]

    def _servers_for(self, ticket: Ticket, decision: Decision, now: float) -> Route | None:
        assert decision.chosen is not None
        max_age_s = self._config.loads.max_age_s
        prefills = self._usable(ticket, decision.chosen.prefill_site, now, decode=False)
        decodes = self._usable(ticket, decision.chosen.decode_site, now, decode=True)
        wanted = decision.prefill_instance
        prefill = next((one for one in prefills if one.name == wanted), None)
        if prefill is None and prefills:
            # Among a site's servers the longest prefix wins, then the shortest queue.
            prefills = least_blamed(ticket, prefills)
            most = max(ticket.cached.get(one.name, 0) for one in prefills)
            best = [one for one in prefills if ticket.cached.get(one.name, 0) >= most]
            prefill = least_loaded(best, now, max_age_s)
        if prefill is None:
            return None
        tokens = max(0, ticket.prompt.tokens - ticket.cached.get(prefill.name, 0))
        if prefill.role == "collocated":
            if decision.chosen.decode_site != decision.chosen.prefill_site:
                return None
            return Route(prefill, None, tokens, self._priority(decision, ticket, now))
        decodes = [one for one in decodes if one.role == "decode"]
        wanted = decision.decode_instance
        decode = next((one for one in decodes if one.name == wanted), None)
        decode = decode or least_running(least_blamed(ticket, decodes), now, max_age_s)
        if decode is None:
            return None
        priority, prefill_s = self._priority(decision, ticket, now), decision.chosen.prefill_s
        return Route(decode, prefill, tokens, priority, prefill_s, self._giver(ticket, decision, now))

    def _giver(self, ticket: Ticket, decision: Decision, now: float) -> ServerHandle | None:
        """Who has the prefix that is to be moved; None: nothing is, or nobody has it any more."""
        move = decision.cache_move
        if move is None:
            return None
        able = self._usable(ticket, move.source, now, decode=False)
        return next((one for one in able if ticket.cached.get(one.name, 0) >= move.tokens), None)

    def _priority(self, decision: Decision, ticket: Ticket, now: float) -> int:
        """The order of service as SGLang's priority: the negative of a time of day in ms, which several
        routers of synchronised clocks have in common.
        """
        return -round(1e3 * (_order(decision, ticket) - now + self._wall_clock()))

    def _dispatched(
        self, ticket: Ticket, view: RequestView, decision: Decision, route: Route, now: float
    ) -> None:
        ticket.decision, ticket.route = decision, route
        self._under_policy(ticket)
        assert decision.chosen is not None
        ticket.link = decision.chosen.link
        if ticket.link is not None:
            ticket.link_sent_s, ticket.probe = self._clock(), self._links.on_sent(ticket.link)
        self.policy.on_dispatch(request=view, decision=decision, now=now)
        self.pen.recall(self.policy, self._clock)
        self._record(ticket, decision, route)

    def _record(self, ticket: Ticket, decision: Decision, route: Route | None) -> None:
        prefill = route.prefill or route.decode if route else None
        record = Record(
            at_s=self._wall_clock(),
            request=ticket.request_id,
            model=ticket.model,
            tenant=ticket.tenant,
            slo_class=ticket.slo_class,
            attempt=ticket.attempt,
            prompt_tokens=ticket.prompt.tokens,
            cached_tokens=dict(ticket.cached),
            decision=decision,
            prefill=prefill.name if prefill else None,
            decode=route.decode.name if route else None,
        )
        self.records.append(record)
        self._on_record(record)

    def on_prefill_done(self, ticket: Ticket, attempt: int) -> None:
        """That attempt's prefill server has answered, as it does once the bytes are across."""
        if ticket.policy is not None and ticket.attempt == attempt:
            ago_s = ticket.decision.chosen.tail_s if ticket.decision and ticket.decision.chosen else 0.0
            ticket.policy.on_prefill_done(request=ticket.request_id, now=self._clock(), ago_s=ago_s)
        self._freed()

    def on_first_token(self, ticket: Ticket, cached_tokens: int | None) -> None:
        if ticket.link is not None:
            self._links.on_succeeded(ticket.link, self._clock())
            ticket.link = None
        judge_servers(ticket, self._clock(), self._config.retry.cool_down_s)
        if ticket.policy is not None:
            ticket.policy.on_first_token(
                request=ticket.request_id, now=self._clock(), cached_tokens=cached_tokens
            )

    def on_failed(self, ticket: Ticket, route: Route, failed: AttemptFailed) -> None:
        """An attempt brought no token: learn from it, and lead the next one elsewhere."""
        now, retry = self._clock(), self._config.retry
        prefill_site = route.prefill.site if route.prefill else route.decode.site
        culprit = blame_servers(ticket, route, failed, now, retry.cool_down_s)
        if is_decodes_alone(failed):
            ticket.failed_servers.add(route.decode.name)
        elif ticket.link is not None:
            ticket.failed_sites.add(prefill_site)
            if tells_of_link(failed):
                silent = failed.kind is FailureKind.TIMEOUT
                self._links.on_failed(ticket.link, now, ticket.link_sent_s, silent=silent)
        elif failed.kind is not FailureKind.SERVER:
            ticket.failed_servers.add(culprit.name)
        policy = ticket.policy
        if policy is not None and failed.kind is FailureKind.REFUSED:
            retry_after_s = failed.retry_after_s
            policy.on_refused(
                request=ticket.request_id, reason=failed.message, retry_after_s=retry_after_s, now=now
            )
        elif policy is not None:
            reason = f"{failed.kind}: {failed.message}"
            policy.on_failed(request=ticket.request_id, site=prefill_site, reason=reason, now=now)
        self._leave_link(ticket)
        ticket.attempt += 1
        self._freed()

    def _leave_link(self, ticket: Ticket) -> None:
        if ticket.link is not None:
            self._links.on_given_up(ticket.link, probe=ticket.probe)
            ticket.link = None

    def forgive(self, ticket: Ticket) -> None:
        """Every path has failed once: all may be tried again."""
        ticket.failed_sites.clear()
        ticket.failed_servers.clear()

    def on_finished(self, ticket: Ticket) -> None:
        """It is answered, or given up. Harmless when repeated."""
        self._leave_link(ticket)
        if ticket.policy is not None:
            ticket.policy.on_finished(request=ticket.request_id, now=self._clock())
            ticket.policy = None
        self._freed()


def _order(decision: Decision, ticket: Ticket) -> float:
    """Order of service at the door: smaller first."""
    if decision.order_s is not None:
        return decision.order_s
    return decision.deadline_s if decision.deadline_s is not None else ticket.arrived_s
