"""The simulated system: requests come to the door, the policy decides, engines and pipes take their time.

What decides is what decides online: the policy, the link estimators, the ledgers and the order of sending are
the very objects of routing/, admission/ and transfer/. What is simulated is what they decide about.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from prfaas.model.decisions import Action, Decision, Verdict
from prfaas.model.ids import LinkId, SiteId
from prfaas.routing.base import Policy
from prfaas.simulator.agenda import Agenda
from prfaas.simulator.choosing import Ranked, pick_both, queue_key
from prfaas.simulator.connections import Connections
from prfaas.simulator.engine import Engine
from prfaas.simulator.job import Job
from prfaas.simulator.links import WatchedLink
from prfaas.simulator.live import Live, Sent
from prfaas.simulator.moving import Movers
from prfaas.simulator.network import Network
from prfaas.simulator.observing import Outlook
from prfaas.simulator.outages import repeats_s
from prfaas.simulator.patience import Patience
from prfaas.simulator.pipes import Pipe, Transfer
from prfaas.simulator.prefixes import HeardPrefixes
from prfaas.simulator.record import Record
from prfaas.simulator.settings import Settings
from prfaas.simulator.waiting import WaitingRoom
from prfaas.workload.requests import TimedRequest

if TYPE_CHECKING:
    from prfaas.simulator.roles import RoleChanges

K_ATTEMPTS = 6  # a request that failed so often is answered with an error
K_NO_DEADLINE_S = 600.0  # s, order of sending for requests without one


class World:
    """Runs one workload through one policy. Build it with simulator.build.simulation_of."""

    def __init__(
        self,
        agenda: Agenda,
        engines: Iterable[Engine],
        network: Network,
        policy: Policy,
        record: Record,
        settings: Settings,
    ) -> None:
        self.agenda, self.network, self.policy = agenda, network, policy
        self.record, self.settings = record, settings
        self.engines = {engine.name: engine for engine in engines}
        self.live: dict[int, Live] = {}
        self._waiting = WaitingRoom(agenda, policy, self._door)
        self._patience = Patience(agenda, settings.retry, self.fail)
        self._connections: dict[str, Connections] = {}
        """To servers of other sites, by name."""
        self._expiring: deque[tuple[float, int]] = deque()
        """When requests without a first token are given up, and their numbers."""
        self._by_site: dict[SiteId, list[Engine]] = {}
        for engine in self.engines.values():
            self._by_site.setdefault(engine.site, []).append(engine)
        self._movers = Movers(agenda, network, self._by_site)
        self.sort_roles()
        self.roles: RoleChanges | None = None
        """Who watches, and changes roles; None: they stay."""
        self.links = {
            LinkId(*ends): WatchedLink(pipe, network, agenda, self._link_went_down)
            for ends, pipe in network.pipes.items()
        }
        watched = {link.pipe: link for link in self.links.values()}
        network.on_activity = lambda pipe, now: watched[pipe].wake(now)
        heard = HeardPrefixes(self.engines.values(), lambda: agenda.now, settings.index_delay_s)
        # In order of arrival, instances are chosen here, by what they have to do at the moment.
        listed = policy.names_instances and settings.service_order == "deadline"
        self.outlook = Outlook(
            self._by_site, self.links, settings.homes, settings.observe_every_s, heard, listed,
            hears_links=settings.retry is not None,
        )  # fmt: skip
        self._requests: Iterator[TimedRequest] = iter(())
        self.exhausted = True
        """No further arrivals."""

    def sort_roles(self) -> None:
        """Which engines take what, anew after a change of role."""
        self._prefills = {
            site: Ranked.by_backlog([one for one in engines if one.role != "decode"])
            for site, engines in self._by_site.items()
        }
        self._decodes = {
            site: Ranked.by_fullness([one for one in engines if one.role != "prefill"])
            for site, engines in self._by_site.items()
        }

    # Arrivals.

    def play(self, requests: Iterable[TimedRequest]) -> None:
        """Take the workload in; arrivals are drawn one by one, so that a million need no list."""
        self._requests = iter(requests)
        self.exhausted = False
        self._next_arrival()

    def _next_arrival(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self.exhausted = True
        else:
            self.agenda.at(request.arrival_s, lambda now: self._arrive(request, now))

    def _arrive(self, request: TimedRequest, now: float) -> None:
        self._next_arrival()
        live = Live(request)
        self.live[request.index] = live
        if self.settings.timeout_s < math.inf:
            self._expiring.append((now + self.settings.timeout_s, request.index))
            if len(self._expiring) == 1:
                self.agenda.at(self._expiring[0][0], self._expire)
        self._door(live, now)

    def _expire(self, now: float) -> None:
        """All wait equally long: one look a while, at the first that is still under way, does for all."""
        while self._expiring:
            at_s, index = self._expiring[0]
            live = self.live.get(index)
            if live is not None and live.first_token_s is None:
                if at_s > now:
                    self.agenda.at(at_s, self._expire)
                    return
                self._withdraw(live, now)
                self._end(live, now, "deadline passed")
            self._expiring.popleft()

    # The door.

    def _door(self, live: Live, now: float) -> None:
        if live.over:
            return
        live.view = view = self.outlook.view(live.request, live.excluded, live.attempt, now)
        decision = self.policy.decide(view, self.outlook.snapshot(now), now)
        live.decision = decision
        if decision.action is Action.DISPATCH:
            self._dispatch(live, decision, now)
        elif decision.action is Action.HOLD:
            self._waiting.enter(live, decision, now)
        elif decision.action is Action.SHED:
            self._end(live, now, "shed")
        else:
            self._end(live, now, "no path")
        self._waiting.look(now)

    # A dispatched request.

    def _dispatch(self, live: Live, decision: Decision, now: float) -> None:
        chosen, request, view = decision.chosen, live.request, live.view
        assert chosen is not None  # DISPATCH has a choice
        assert view is not None  # the door made it
        order = self.settings.service_order
        key = queue_key(decision, order)
        prefill, decode = pick_both(
            decision, request, view, key, order, now,
            self.engines, self._prefills.get(chosen.prefill_site), self._decodes.get(chosen.decode_site),
        )  # fmt: skip
        if prefill is None or decode is None:
            self._retry(live, chosen.prefill_site, "no instance is up", now, dispatched=False)
            return
        link_id = chosen.link
        if link_id is not None and self.settings.admission:
            answer = self.links[link_id].offer(live, prefill, request.prompt_tokens, now)
            if answer.verdict is Verdict.REFUSED:
                self.record.count_refusal()
                self.policy.on_refused(
                    request=live.name,
                    reason=str(answer.reason),
                    retry_after_s=answer.retry_after_s,
                    now=now,
                )
                self._retry(live, chosen.prefill_site, str(answer.reason), now, dispatched=False)
                return
        self.policy.on_dispatch(request=view, decision=decision, now=now)
        if self.roles is not None:
            self.roles.on_dispatch(live, decision, now)
        live.prefill, live.decode, live.link = prefill, decode, link_id
        send = partial(self._send, live, decision, key)
        if chosen.cache_move is None:
            send(now)
        else:
            patience_s = chosen.cache_move.patience_s(chosen.ttft_s)
            self._movers.bring(live, chosen.cache_move, patience_s, send, now)

    def _send(self, live: Live, decision: Decision, key: float, now: float) -> None:
        """To the instances that were picked for it."""
        chosen, request, link_id = decision.chosen, live.request, live.link
        prefill, decode, live.asked_s = live.prefill, live.decode, now
        assert chosen is not None
        assert prefill is not None
        assert decode is not None
        a_token = self.settings.request_bytes_per_token
        if link_id is not None and a_token:
            kept = self._connections.setdefault(prefill.name, Connections())
            way = self.network.pipes.get((link_id.target, link_id.source))
            live.opens = not kept.rests(now)
            live.request_wait_s, live.window_bytes = kept.send(
                a_token * request.prompt_tokens, now, self.network.rtt_s(*link_id), way.loss if way else 0.0
            )
        live.prefill_job = Job(
            live,
            request.prompt_tokens,
            request.output_tokens,
            request.block_ids,
            key,
            on_chunk=self._on_chunk,
            block_tokens=request.block_tokens,
        )
        live.decode_job = Job(
            live, request.prompt_tokens, request.output_tokens, on_join=self._on_join, on_done=self._on_done
        )
        live.decision = Sent(
            chosen.prefill_site, decision.reason, decision.deadline_s, chosen.tail_s, chosen.ttft_s
        )
        live.view = None
        decode.reserve(live.decode_job, request.prompt_tokens + request.output_tokens, self._on_pages, now)

    def _on_pages(self, job: Job, now: float) -> None:
        """The decode side has room: prefill may start, once it has heard."""
        live = job.payload
        assert isinstance(live, Live)
        decode, prefill, prefill_job = live.decode, live.prefill, live.prefill_job
        assert decode is not None
        assert prefill is not None
        assert prefill_job is not None
        begin_s, way, repeats = now, None, repeats_s(0.0, opening=False)
        if live.link is not None:
            # The pages are told to it, and the request is sent to it, over the same distance.
            delay_s = self.network.pipes[live.link].delay_s
            there_s = live.asked_s + delay_s + live.request_wait_s
            begin_s = max(begin_s + delay_s, there_s)
            repeats = repeats_s(self.network.rtt_s(*live.link), opening=live.opens)
            way = self.network.pipes.get((live.link.target, live.link.source))

        def begin(at_s: float) -> None:
            if live.over or prefill_job.void:
                return
            if way is not None and not way.up:
                self.agenda.at(at_s + next(repeats), begin)  # it was lost, and is sent again
                return
            if live.link is not None:
                deadline_s = (live.decision.deadline_s if live.decision else None) or at_s + K_NO_DEADLINE_S
                kv_bytes = prefill.works.kv_bytes(live.request.prompt_tokens)
                live.kv_bytes = kv_bytes
                live.transfer = Transfer(
                    kv_bytes, deadline_s, lambda now: self._on_landed(live, prefill_job, now)
                )
                self.network.start(*live.link, live.transfer, at_s)
            prefill.prefill(prefill_job, at_s)

        if begin_s > now:
            self.agenda.at(begin_s, begin)
        else:
            begin(now)

    def _on_chunk(self, job: Job, now: float, final: bool) -> None:
        live = job.payload
        assert isinstance(live, Live)
        if live.link is not None and live.transfer is not None:
            prefill = live.prefill
            assert prefill is not None
            ready = (
                live.transfer.total_bytes
                if final
                else max(0.0, prefill.works.kv_bytes(job.done) - prefill.profile.state_bytes)
            )
            self.network.supply(*live.link, live.transfer, ready, now)
        if final:
            live.prefilled_s, live.cached_tokens = now, job.cached
            if live.link is None:
                self.policy.on_prefill_done(request=live.name, now=now)
                self._on_landed(live, job, now)
                self._waiting.freed(now)
                self._waiting.look(now)

    def _on_landed(self, live: Live, prefill_job: Job, now: float) -> None:
        if live.over or prefill_job.void:
            return
        self._release_promise(live, now)
        if live.window_bytes and live.prefill is not None:
            self._connections[live.prefill.name].release(live.window_bytes, now)
            live.window_bytes = 0.0
        live.prefill_job = live.transfer = None  # nothing is asked of them again
        if live.link is not None:
            # Its prefill server answers once it hears that the bytes are across; the door takes the predicted
            # tail off, as the router does, and so is wrong by as much as that was.
            tail_s = live.decision.tail_s if isinstance(live.decision, Sent) else 0.0
            answered = partial(self._on_answer, live, live.attempt, tail_s)
            self.agenda.at(now + self.network.answer_s(*live.link, now), answered)
        assert live.decode is not None
        assert live.decode_job is not None
        live.decode.decode(live.decode_job, now)

    def _on_answer(self, live: Live, attempt: int, tail_s: float, now: float) -> None:
        if not live.over and live.attempt == attempt:
            self.policy.on_prefill_done(request=live.name, now=now, ago_s=tail_s)
        self._waiting.freed(now)
        self._waiting.look(now)

    def _release_promise(self, live: Live, now: float) -> None:
        if live.link is not None:
            ledger = self.links[live.link].ledger
            if ledger.holds(live) is not None:
                ledger.release(live, now=now)

    def _on_join(self, job: Job, now: float) -> None:
        live = job.payload
        assert isinstance(live, Live)
        live.first_token_s = now
        self.policy.on_first_token(request=live.name, now=now, cached_tokens=live.cached_tokens)

    def _on_done(self, job: Job, now: float) -> None:
        live = job.payload
        assert isinstance(live, Live)
        if self.roles is not None:
            self.roles.on_answered(live, now)
        self._end(live, now, None)

    # Ends and failures.

    def _end(self, live: Live, now: float, error: str | None) -> None:
        live.over = True
        del self.live[live.request.index]
        self._waiting.leave(live)
        self.policy.on_finished(request=live.name, now=now)
        self.record.request(live, now, error)
        # Nothing leads round to it any more, so that it goes at once and no collection need find it.
        live.prefill_job = live.decode_job = live.transfer = live.view = live.decision = None

    def _withdraw(self, live: Live, now: float) -> None:
        """Take everything of the present attempt away."""
        self._release_promise(live, now)
        self._movers.drop(live, now)
        if live.transfer is not None and live.link is not None:
            self.network.drop(*live.link, live.transfer, now)
        if live.prefill is not None and live.prefill_job is not None:
            live.prefill.give_up(live.prefill_job, now)
        if live.decode is not None and live.decode_job is not None:
            live.decode.give_up(live.decode_job, now)
        live.prefill = live.decode = live.prefill_job = live.decode_job = live.transfer = live.link = None
        live.request_wait_s = live.window_bytes = 0.0

    def _retry(self, live: Live, site: SiteId, reason: str, now: float, dispatched: bool = True) -> None:
        """Another path, without the site that failed; an error when none is left."""
        if dispatched:
            self.policy.on_failed(request=live.name, site=site, reason=reason, now=now)
        live.attempt += 1
        live.excluded = live.excluded | {site}
        if live.attempt >= K_ATTEMPTS:
            self._end(live, now, reason)
        else:
            self._door(live, now)

    def fail(self, live: Live, reason: str, now: float) -> None:
        """The attempt is lost: before the first token another is made, after it the answer breaks off."""
        site = live.decision.prefill_site if live.decision else None
        started = live.first_token_s is not None
        self._withdraw(live, now)
        if started or site is None:
            self._end(live, now, reason)
        else:
            self._retry(live, site, reason, now)

    def abandon(self, now: float) -> None:
        """Nothing will happen any more: what is under way ends as failed."""
        for live in list(self.live.values()):
            self._withdraw(live, now)
            self._end(live, now, "unfinished")

    def _link_went_down(self, pipe: Pipe, now: float) -> None:
        self.record.event(now, f"link {pipe.source}->{pipe.target} believed down")
        ends = (pipe.source, pipe.target)
        self._patience.watch(
            [one for one in self.live.values() if one.link == ends and one.first_token_s is None]
        )

    def kill(self, name: str, now: float) -> None:
        """An instance dies; what it held is lost."""
        engine = self.engines[name]
        engine.kill(now)
        self.record.event(now, f"{name} killed")
        self.outlook.forget_sites()
        for live in [one for one in self.live.values() if engine in (one.prefill, one.decode)]:
            if live.decode is engine or live.first_token_s is None:
                self.fail(live, f"{name} died", now)

    def restart(self, name: str, now: float) -> None:
        self.engines[name].restart(now)
        self.record.event(now, f"{name} restarted")
