"""A link's ledger, estimate and shares, kept by one pump for all of a site's."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from prfaas.admission import Admitted, Expired, Ledger, LedgerEvent, LinkEstimator, Share, ShareBook
from prfaas.config.pump import LinkConfig
from prfaas.model.decisions import AdmissionDecision, Verdict
from prfaas.model.errors import LocalProtocolError
from prfaas.model.ids import LinkId
from prfaas.model.observations import LinkObservation

log = logging.getLogger(__name__)

News = Callable[[str, dict[str, Any]], None]
"""(transfer, what): how an offer stands now."""


def decision_body(decision: AdmissionDecision) -> dict[str, Any]:
    finish = decision.finish_by_s
    return {
        "verdict": decision.verdict.value,
        "reason": decision.reason.value if decision.reason else "",
        "retry_after_s": decision.retry_after_s,
        "finish_in_s": None if finish is None or math.isinf(finish) else finish - decision.at_s,
    }


class LedgerHost:
    """A link's ledger, estimate and shares, kept here for all of the site's pumps."""

    def __init__(self, link: LinkId, config: LinkConfig, now: float) -> None:
        self.link, self.config = link, config.admission
        self.estimator = LinkEstimator(link, config.admission, now)
        self.ledger = Ledger(link, 0.0, queue_limit=config.admission.queue_limit)
        self.book = ShareBook(link, config.admission)
        self._tell: dict[str, tuple[str, News]] = {}
        self._seen_s: dict[str, float] = {}
        self._set_capacity(now)

    def report(self, seen: LinkObservation, demand_bps: float, now: float) -> Share | None:
        """A pump says what it saw and would like; its new share, None when too many pumps hold one."""
        self._seen_s[seen.sender] = now
        for event in self.estimator.on_observation(seen):
            log.info("link %s: %s", self.link, event)
        self._set_capacity(now)
        try:
            return self.book.renew(seen.sender, demand_bps, now=now)
        except LocalProtocolError as error:
            log.warning("%s", error)
            return None

    def offer(self, pump: str, key: str, body: dict[str, Any], news: News, now: float) -> dict[str, Any]:
        """A transfer asks for its place; the ledger's answer. `news` hears what becomes of it later."""
        self._seen_s.setdefault(pump, now)
        self._supersede(key, now)
        first_in_s, ready_in_s = float(body.get("first_in_s", 0.0)), float(body.get("ready_in_s", 0.0))
        decision = self.ledger.offer(
            key, int(body["size_bytes"]), now + float(body["deadline_s"]), now=now, first_s=now + first_in_s,
            ready_s=now + ready_in_s, may_queue=bool(body.get("may_queue", True)),
        )  # fmt: skip
        if decision.verdict is not Verdict.REFUSED:
            self._tell[key] = (pump, news)
        return decision_body(decision)

    def _supersede(self, key: str, now: float) -> None:
        """A pump started anew asks again for what the one before it was promised (its part of the key): that
        place is given up for this question.
        """
        _, _, asked = key.partition("/")
        for before in [k for k in self._tell if asked and k != key and k.partition("/")[2] == asked]:
            self.release(before, now)

    def progress(self, key: str, remaining_bytes: int, now: float) -> None:
        if self.ledger.holds(key) is Verdict.ADMITTED:
            self._news(self.ledger.on_progress(key, remaining_bytes, now=now), now)

    def release(self, key: str, now: float) -> None:
        self._tell.pop(key, None)
        if self.ledger.holds(key) is not None:
            self._news(self.ledger.release(key, now=now), now)

    def tick(self, now: float) -> None:
        for event in self.estimator.on_timer(now):
            log.info("link %s: %s", self.link, event)
        self._set_capacity(now)
        # What a pump that has gone was promised serves nobody.
        for pump, seen_s in list(self._seen_s.items()):
            if now - seen_s > 5 * self.config.share_ttl_s:
                del self._seen_s[pump]
                self.estimator.forget_sender(pump)
                for key in [k for k, (holder, _) in self._tell.items() if holder == pump]:
                    self.release(key, now)

    def _set_capacity(self, now: float) -> None:
        usable_bps = self.estimator.estimate(now).usable_bps
        self.book.set_capacity(usable_bps)
        self._news(self.ledger.set_capacity(usable_bps * (1 - self.config.headroom), now=now), now)

    def _news(self, events: list[LedgerEvent], now: float) -> None:
        for event in events:
            key = str(event.transfer)
            entry = self._tell.get(key)
            if entry is None:
                continue
            if isinstance(event, Admitted):
                body = {
                    "verdict": Verdict.ADMITTED.value,
                    "reason": "",
                    "finish_in_s": event.finish_by_s - now,
                }
            elif isinstance(event, Expired):
                body = {"verdict": Verdict.REFUSED.value, "reason": event.reason.value}
                del self._tell[key]
            else:
                late_s = event.finish_by_s - now
                body = {
                    "verdict": "late",
                    "reason": "",
                    "finish_in_s": None if math.isinf(late_s) else late_s,
                }
            entry[1](key, body)
