"""A link's ledger, estimate and shares, kept by one pump for all of a site's.

What it is told may be lost, come twice or in another order; pages of the pumps' books (admission/offers.py)
put right what that leaves behind. Free of clocks and sockets: the desk carries its bodies.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from prfaas.admission import (
    Admitted,
    Expired,
    Ledger,
    LedgerEvent,
    LinkEstimator,
    Share,
    ShareBook,
    Standing,
)
from prfaas.admission.offers import K_PAGE_ROWS
from prfaas.config.pump import LinkConfig
from prfaas.model.decisions import AdmissionDecision, Verdict
from prfaas.model.errors import LocalProtocolError
from prfaas.model.ids import LinkId
from prfaas.model.observations import LinkObservation

log = logging.getLogger(__name__)

Body = dict[str, Any]
News = Callable[[str, Body], None]
"""(transfer, what): how an offer stands now."""

K_NUMBER_MOST = 1 << 62
K_SEEN = tuple(one.name for one in fields(LinkObservation) if one.name not in ("link", "at_s"))
"""Of a report. A pump of a later version may say more."""


def decision_body(decision: AdmissionDecision) -> Body:
    finish = decision.finish_by_s
    return {
        "verdict": decision.verdict.value,
        "reason": decision.reason.value if decision.reason else "",
        "retry_after_s": decision.retry_after_s,
        "finish_in_s": None if finish is None or math.isinf(finish) else finish - decision.at_s,
    }


@dataclass(slots=True)
class _Held:
    pump: str
    number: int
    """The pump's own number of the offer; 0 from a pump that sends no pages."""
    news: News


class LedgerHost:
    """A link's ledger, estimate and shares, kept here for all of the site's pumps."""

    def __init__(
        self, link: LinkId, config: LinkConfig, now: float, before_serial: int = 0, opens_in_s: float = 0.0
    ) -> None:
        """`before_serial` and `opens_in_s`: see ShareBook. Milliseconds since 1970 grow faster than shares
        are granted.
        """
        self.link, self.config = link, config.admission
        self.estimator = LinkEstimator(link, config.admission, now)
        self.ledger = Ledger(link, 0.0, queue_limit=config.admission.queue_limit)
        self.book = ShareBook(link, config.admission, before_serial, now + opens_in_s)
        self._held: dict[str, _Held] = {}
        self._numbered: dict[str, dict[int, str]] = {}
        """Pump to its numbered offers that are held here, by key."""
        self._seen_s: dict[str, float] = {}
        self._believed: deque[tuple[float, float]] = deque()
        """From when on what was believed of the usable rate, as far back as a share lives."""
        self._set_capacity(now)

    def answer(self, body: Body, news: News, now: float) -> Body:
        """What to answer to another pump's question. Raises KeyError, TypeError or ValueError for what isn't
        one.
        """
        op, pump, key = body["op"], str(body["pump"]), str(body.get("key", ""))
        if op == "report":
            known = {name: body["seen"][name] for name in K_SEEN if name in body["seen"]}
            seen = LinkObservation(link=self.link, at_s=now, **known)
            holds = int(body.get("holds", 0)), float(body.get("holds_bps", 0.0))
            share = self.report(seen, float(body["demand_bps"]), now, holds)
            estimate = {
                k: v for k, v in asdict(self.estimator.estimate(now)).items() if k not in ("link", "at_s")
            }
            said = asdict(share) if share else {}
            said.pop("link", None)
            page = self.page(pump, body["page"], now) if "page" in body else {}
            return {"op": "share", "share": said, "estimate": estimate, **page}
        if op == "offer":
            number = int(body.get("n", 0))
            return {"op": "news", "key": key, "n": number, **self.offer(pump, key, body, news, now)}
        if op == "progress":
            self.progress(key, int(body["remaining_bytes"]), now)
        elif op == "release":
            held = self._held.get(key)
            # A release of an earlier offer by this key ends that one, not the one after it.
            if held is not None and held.number == int(body.get("n", held.number)):
                self.release(key, now)
        return {"op": "done"}

    def report(
        self, seen: LinkObservation, demand_bps: float, now: float, holds: tuple[int, float] = (0, 0.0)
    ) -> Share | None:
        """A pump says what it saw, would like and holds (its share's serial, and the rate while it lives);
        its new share, None when too many pumps hold one.
        """
        self._seen_s[seen.sender] = now
        for event in self.estimator.on_observation(seen):
            log.info("link %s: %s", self.link, event)
        self._set_capacity(now)
        try:
            serial, held_bps = holds
            return self.book.renew(seen.sender, demand_bps, now=now, holds=serial, holds_bps=held_bps)
        except LocalProtocolError as error:
            log.warning("%s", error)
            return None

    def page(self, pump: str, page: Body, now: float) -> Body:
        """A page of what a pump stands by: what of it is unknown here, and what stands otherwise. Raises
        KeyError, TypeError or ValueError for what isn't one.
        """
        after, upto, rows = int(page["after"]), int(page["upto"]), _rows(page["rows"])
        held = self._numbered.get(pump, {})
        named = {number for number, _, _ in rows}
        for number in [n for n in held if after < n <= upto and n not in named]:
            self.release(held[number], now)
        unknown: list[int] = []
        others: list[tuple[int, str, float | None]] = []
        self._news(
            self.ledger.on_progress_of_all({held[n]: left for n, _, left in rows if n in held}, now=now), now
        )
        for number, standing, _ in rows:
            key = held.get(number)
            here = None if key is None else self._standing(key)
            if key is None or here is None:
                unknown.append(number)
            elif here is Standing.QUEUED and standing >= Standing.ADMITTED:
                self.release(key, now)  # it was promised elsewhere meanwhile, and is to come as that
                unknown.append(number)
            elif here != standing:
                told = self._standing_body(key, now)
                others.append((number, told["verdict"], told["finish_in_s"]))
        return {"unknown": unknown, "news": others}

    def offer(self, pump: str, key: str, body: Body, news: News, now: float) -> Body:
        """A transfer asks for its place (again: `n` is its number at that pump); the ledger's answer. `news`
        hears what becomes of it later. `stands`: it was promised by another ledger, and gets a place.
        """
        self._seen_s.setdefault(pump, now)
        number = int(body.get("n", 0))
        known = self._held.get(key)
        if known is not None:
            if number and (known.pump, known.number) == (pump, number):
                known.news = news
                if self._standing(key) is not None:
                    return self._standing_body(key, now)
            if number >= known.number and known.number:
                self.release(key, now)  # the same key again: another question
        self._supersede(key, now)
        size_bytes, deadline_s = int(body["size_bytes"]), now + float(body["deadline_s"])
        first_s = now + float(body.get("first_in_s", 0.0))
        ready_s = now + float(body.get("ready_in_s", 0.0))
        if body.get("stands"):
            try:
                events = self.ledger.restore(
                    key, size_bytes, deadline_s, now=now, first_s=first_s, ready_s=ready_s
                )
            except LocalProtocolError as error:
                raise ValueError(str(error)) from None
            self._hold(key, pump, number, news)
            self._news([one for one in events if one.transfer != key], now)
            return self._standing_body(key, now)
        decision = self.ledger.offer(
            key, size_bytes, deadline_s, now=now, first_s=first_s, ready_s=ready_s,
            may_queue=bool(body.get("may_queue", True)),
        )  # fmt: skip
        if decision.verdict is not Verdict.REFUSED:
            self._hold(key, pump, number, news)
        return decision_body(decision)

    def _hold(self, key: str, pump: str, number: int, news: News) -> None:
        self._held[key] = _Held(pump, number, news)
        if number:
            self._numbered.setdefault(pump, {})[number] = key

    def _forget(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held is None or not held.number:
            return
        numbered = self._numbered[held.pump]
        del numbered[held.number]
        if not numbered:
            del self._numbered[held.pump]

    def _standing(self, key: str) -> Standing | None:
        """How it stands here; None for what isn't held."""
        verdict = self.ledger.holds(key)
        if verdict is Verdict.ADMITTED:
            return Standing.LATE if self.ledger.is_late(key) else Standing.ADMITTED
        return Standing.QUEUED if verdict is Verdict.QUEUED else None

    def _standing_body(self, key: str, now: float) -> Body:
        """The same as news."""
        standing = self._standing(key)
        if standing is None or standing is Standing.QUEUED:
            return {"verdict": Verdict.QUEUED.value, "reason": "", "finish_in_s": None}
        finish_s = self.ledger.finish_by(key, now)
        return {
            "verdict": "late" if standing is Standing.LATE else Verdict.ADMITTED.value,
            "reason": "",
            "finish_in_s": None if math.isinf(finish_s) else finish_s - now,
        }

    def _supersede(self, key: str, now: float) -> None:
        """A pump started anew asks again for what the one before it was promised (its part of the key): that
        place is given up for this question.
        """
        _, _, asked = key.partition("/")
        for before in [k for k in self._held if asked and k != key and k.partition("/")[2] == asked]:
            self.release(before, now)

    def progress(self, key: str, remaining_bytes: int, now: float) -> None:
        if self.ledger.holds(key) is Verdict.ADMITTED:
            self._news(self.ledger.on_progress(key, remaining_bytes, now=now), now)

    def release(self, key: str, now: float) -> None:
        self._forget(key)
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
                for key in [k for k, held in self._held.items() if held.pump == pump]:
                    self.release(key, now)

    def believed_bps(self, now: float) -> float:
        """The most that was believed usable while any share that lives now was granted: what all of them
        together are within.
        """
        while len(self._believed) > 1 and self._believed[1][0] <= now - self.config.share_ttl_s:
            self._believed.popleft()
        return max(bps for _, bps in self._believed)

    def _set_capacity(self, now: float) -> None:
        usable_bps = self.estimator.estimate(now).usable_bps
        if not self._believed or self._believed[-1][1] != usable_bps:
            self._believed.append((now, usable_bps))
            self.believed_bps(now)
        self.book.set_capacity(usable_bps)
        self._news(self.ledger.set_capacity(usable_bps * (1 - self.config.headroom), now=now), now)

    def _news(self, events: list[LedgerEvent], now: float) -> None:
        for event in events:
            key = str(event.transfer)
            held = self._held.get(key)
            if held is None:
                continue
            body: Body
            if isinstance(event, Admitted):
                body = {
                    "verdict": Verdict.ADMITTED.value,
                    "reason": "",
                    "finish_in_s": event.finish_by_s - now,
                }
            elif isinstance(event, Expired):
                body = {"verdict": Verdict.REFUSED.value, "reason": event.reason.value}
                self._forget(key)
            else:
                late_s = event.finish_by_s - now
                body = {
                    "verdict": "late",
                    "reason": "",
                    "finish_in_s": None if math.isinf(late_s) else late_s,
                }
            held.news(key, body)


def _rows(flat: Sequence[Any]) -> list[tuple[int, int, int]]:
    """A page's rows. Raises ValueError."""
    sane = isinstance(flat, list) and len(flat) % 3 == 0 and len(flat) <= 3 * K_PAGE_ROWS
    if not sane or not all(type(x) is int and 0 <= x <= K_NUMBER_MOST for x in flat):
        raise ValueError("a page that is none")
    return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
