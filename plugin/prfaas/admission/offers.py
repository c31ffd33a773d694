"""What a pump asks of a link's ledger that another pump keeps: the asking side's book.

Questions, answers and releases may be lost with the stream that carried them, or come in another order than
they were sent. So nothing rests on one message: the pump numbers its offers (a number is never used twice),
and each of its reports carries a page of those that it stands by, as rows of three numbers: number, standing,
bytes left. A page speaks for a range of numbers, up to the last one that existed when it was made:

* what the ledger's host holds in that range and the page doesn't name is dropped: it was given up;
* what the page names and the host doesn't know is asked again (`unknown` in the answer): the question was
  lost, or the host was started anew; what was promised already comes back as promised;
* what stands otherwise at the host is told again (`news` in the answer): the answer was lost.

A page says nothing about numbers beyond its range and brings no promise into being by itself, so one that
comes late, twice or out of order does no harm. Pages are bounded; more offers than one holds go in turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

K_PAGE_ROWS = 512
"""Offers in one page: some 6 KiB."""
K_AGAIN_S = 0.25
"""An offer isn't asked again sooner than this after it was asked."""

Body = dict[str, Any]


class Standing(IntEnum):
    """How an offer stands, as the rows of a page say it."""

    ASKED = 0
    QUEUED = 1
    ADMITTED = 2
    LATE = 3


K_TOLD = ("verdict", "reason", "retry_after_s", "finish_in_s")
"""Fields of news. A host of a later version may send more."""
_REFUSED = "refused"
_STANDING = {"queued": Standing.QUEUED, "admitted": Standing.ADMITTED, "late": Standing.LATE}


@dataclass(slots=True)
class _Offer:
    key: str
    number: int
    left_bytes: int
    deadline_s: float
    first_s: float
    ready_s: float
    may_queue: bool
    asked_s: float
    standing: Standing = Standing.ASKED


class OfferBook:
    """One pump's offers on one link. Bodies are what goes over the wire; times are the caller's seconds."""

    def __init__(self) -> None:
        self._by_number: dict[int, _Offer] = {}  # ascending: numbers are given in order
        self._by_key: dict[str, _Offer] = {}
        self._number = 0
        self._page_from = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def standing(self, key: str) -> Standing | None:
        """None for what isn't in the book."""
        offer = self._by_key.get(key)
        return offer.standing if offer is not None else None

    def standings(self) -> Iterator[tuple[str, Standing]]:
        return ((key, offer.standing) for key, offer in self._by_key.items())

    def ask(self, key: str, body: Mapping[str, Any], now: float) -> Body:
        """A new offer (`size_bytes`, and seconds from now: `deadline_s`, `first_in_s`, `ready_in_s`); the
        question to send. The same key again replaces what it was.
        """
        self.drop(key)
        self._number += 1
        offer = _Offer(
            key, self._number, int(body["size_bytes"]), now + float(body["deadline_s"]),
            now + float(body.get("first_in_s", 0.0)), now + float(body.get("ready_in_s", 0.0)),
            bool(body.get("may_queue", True)), now,
        )  # fmt: skip
        self._by_number[offer.number] = self._by_key[key] = offer
        return self._question(offer, now)

    def drop(self, key: str) -> Body | None:
        """It is over or given up; the release to send. None if the book doesn't have it."""
        offer = self._by_key.pop(key, None)
        if offer is None:
            return None
        del self._by_number[offer.number]
        return {"op": "release", "key": key, "n": offer.number}

    def progress(self, key: str, left_bytes: int) -> None:
        """So many bytes of it are still to come. The next page says so."""
        offer = self._by_key.get(key)
        if offer is not None:
            offer.left_bytes = max(0, min(offer.left_bytes, left_bytes))

    def decide(self, key: str, standing: Standing) -> None:
        """It was decided without the host (which can't be reached), and is to be handed over to it later."""
        offer = self._by_key.get(key)
        if offer is not None:
            offer.standing = standing

    def unheard(self, now: float, for_s: float) -> list[tuple[str, Body]]:
        """Offers that were asked at least so long ago and have no answer, with the question as it is now."""
        return [
            (offer.key, self._question(offer, now))
            for offer in self._by_number.values()
            if offer.standing is Standing.ASKED and now - offer.asked_s >= for_s
        ]

    def page(self) -> Body:
        """The next page, for a report: `after` < numbers <= `upto`, and rows one after the other."""
        after, upto, n_rows = self._page_from, self._number, 0
        rows: list[int] = []
        for number, offer in self._by_number.items():
            if number <= after:
                continue
            if n_rows == K_PAGE_ROWS:
                upto = rows[-3]
                break
            rows += (number, int(offer.standing), offer.left_bytes)
            n_rows += 1
        self._page_from = upto if upto < self._number else 0
        return {"after": after, "upto": upto, "rows": rows}

    def hear(self, body: Mapping[str, Any], now: float) -> tuple[list[tuple[str, Body]], list[Body]]:
        """An answer or news of the host: what to tell the servers, by key, and what to ask again. Raises
        KeyError, TypeError or ValueError for what is neither.
        """
        if body.get("op") == "news":
            offer = self._by_key.get(str(body.get("key", "")))
            if offer is None or body.get("n", offer.number) != offer.number:
                return [], []
            said = {name: body[name] for name in K_TOLD if name in body}
            return self._told(offer, said), []
        news: list[tuple[str, Body]] = []
        for number, verdict, finish_in_s in body.get("news", ()):
            if number in self._by_number:
                said = {"verdict": verdict, "reason": "", "finish_in_s": finish_in_s}
                news += self._told(self._by_number[number], said)
        again: list[Body] = []
        for number in body.get("unknown", ()):
            offer = self._by_number.get(number)
            if offer is not None and now - offer.asked_s >= K_AGAIN_S:
                offer.asked_s = now
                again.append(self._question(offer, now))
        return news, again

    def _told(self, offer: _Offer, said: Body) -> list[tuple[str, Body]]:
        standing = _STANDING.get(said["verdict"])
        if standing is None and said["verdict"] != _REFUSED:
            raise ValueError(f"a verdict of {said['verdict']!r}")
        if offer.standing >= Standing.ADMITTED and (standing is None or standing < Standing.ADMITTED):
            return []  # older than what is known: a promise is never taken back, only late
        if standing is None:
            self.drop(offer.key)
        else:
            offer.standing = standing
        return [(offer.key, said)]

    def _question(self, offer: _Offer, now: float) -> Body:
        question: Body = {
            "op": "offer", "key": offer.key, "n": offer.number, "size_bytes": offer.left_bytes,
            "deadline_s": offer.deadline_s - now, "first_in_s": max(0.0, offer.first_s - now),
            "ready_in_s": max(0.0, offer.ready_s - now), "may_queue": offer.may_queue,
        }  # fmt: skip
        if offer.standing >= Standing.ADMITTED:
            question["stands"] = True
        return question
