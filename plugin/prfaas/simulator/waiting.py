"""Requests that the policy keeps at the door, and when each is decided anew."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from prfaas.model.decisions import Decision
from prfaas.routing.base import Policy
from prfaas.simulator.agenda import Agenda
from prfaas.simulator.live import Live

K_TURNS = 10_000  # questions at one moment, beyond which a policy would ask for ever


class WaitingRoom:
    """`decide(live, now)` is called for whoever's turn it is; it is out of the room then."""

    def __init__(self, agenda: Agenda, policy: Policy, decide: Callable[[Live, float], None]) -> None:
        self._agenda, self._policy, self._decide = agenda, policy, decide
        self._held: deque[Live] = deque()
        self._planned: dict[str, Live] = {}
        """Held for an instance: the policy recalls them."""
        self._looks_s = math.inf
        """When it is asked for that next."""

    def enter(self, live: Live, decision: Decision, now: float) -> None:
        """It is held, as decided."""
        if decision.planned:
            assert live.view is not None  # the door made it
            self._policy.on_hold(request=live.view, decision=decision, now=now)
            self._planned[decision.request] = live
            return
        if live not in self._held:
            self._held.append(live)
        if decision.until_s is not None:
            self._agenda.at(max(decision.until_s, now + 1e-3), lambda at_s: self._ask_again(live, at_s))

    def leave(self, live: Live) -> None:
        """It waits no longer. Harmless for one that isn't here."""
        if live in self._held:
            self._held.remove(live)
        self._planned.pop(live.name, None)

    def _ask_again(self, live: Live, now: float) -> None:
        if live in self._held:
            self._held.remove(live)
            self._decide(live, now)

    def freed(self, now: float) -> None:
        """Those held are asked for again in turn, until one is held still."""
        for _ in range(len(self._held)):
            live = self._held.popleft()
            self._decide(live, now)
            if self._held and self._held[-1] is live:
                self._held.rotate(1)
                return

    def look(self, now: float) -> None:
        """Something has happened: once all of this moment has, the policy is asked whose turn it is."""
        if self._planned and self._looks_s > now:
            self._looks_s = now
            self._agenda.at(now, self._recall)

    def _recall(self, now: float) -> None:
        if now < self._looks_s:
            return  # it was put off since
        for _ in range(K_TURNS):
            requests, self._looks_s = self._policy.recalls(now)
            for request in requests:
                self._looks_s = now  # what it decides is seen to in the next round
                self._decide(self._planned.pop(request), now)
            if not requests:
                break
        else:
            raise RuntimeError(f"{self._policy.name} recalls {requests[0]} for ever at {now:.6f}")
        if self._looks_s < math.inf:
            self._agenda.at(self._looks_s, self._recall)
