"""How long the door waits for an attempt whose bytes can't cross: what ends it, where a dead link doesn't."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from prfaas.config.router import Retry
from prfaas.simulator.agenda import Agenda
from prfaas.simulator.live import Live


def patience_s(retry: Retry, predicted_s: float, waited_s: float) -> float:
    """How long the door waits for an attempt's first token, as the router does."""
    wanted_s = max(retry.first_token_min_s, retry.first_token_factor * predicted_s)
    return min(wanted_s, max(0.1, retry.total_s - waited_s))


class Patience:
    """Ends the attempts that wait for a dead link when a door would: `fail(live, reason, now)`."""

    def __init__(self, agenda: Agenda, retry: Retry | None, fail: Callable[[Live, str, float], None]) -> None:
        """`retry`: None where no door is in between, and nobody gives up before the request's own time."""
        self._agenda, self._retry, self._fail = agenda, retry, fail

    def watch(self, waiting: Iterable[Live]) -> None:
        """These wait for bytes over a link that has just been found dead."""
        for live in waiting:
            if self._retry is not None and live.decision is not None:
                predicted_s = live.decision.predicted_ttft_s or 0.0
                wait_s = patience_s(self._retry, predicted_s, live.asked_s - live.request.arrival_s)
                self._agenda.at(live.asked_s + wait_s, partial(self._look, live, live.attempt))

    def _look(self, live: Live, attempt: int, now: float) -> None:
        if not live.over and live.attempt == attempt and live.first_token_s is None:
            self._fail(live, "no first token in time", now)
