"""A prefill server's questions to the links' ledgers: may a room's bytes cross, asked before prefill spends a
second on it. No SGLang, no waiting: the ledger's word comes on the pump client's thread.

A room has an offer for each peer that granted it pages. It is *held* (SGLang sees it as still bootstrapping)
until all of them are admitted; one that is refused refuses the room. What was admitted may turn out late when
the link's estimate falls: a room that has sent nothing yet is refused then, one that is under way goes on.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from prfaas.model.decisions import Verdict
from prfaas.pump_client import Offer, PumpClient
from prfaas.sglang.refusal import K_RETRY_AFTER_S, Refusal

logger = logging.getLogger(__name__)


@dataclass
class _Asked:
    """A room's offers, by the peer's session."""

    offers: dict[str, Offer] = field(default_factory=dict)
    targets: dict[str, Any] = field(default_factory=dict)
    """Whom a refusal is told, as the caller names it."""
    due_s: float = math.inf
    """When the last of its bytes must be across, on the monotonic clock."""
    held: bool = False
    under_way: bool = False


class AskedRooms:
    """All rooms of a prefill server that have asked. `admit(room)` is called for a room that was held and is
    held no more; `refuse(room, targets, refusal)` for one that isn't to be. Both without the lock, at most
    once a life of a room."""

    def __init__(
        self,
        pump: PumpClient,
        within_s: float,
        may_queue: bool,
        admit: Callable[[int], None],
        refuse: Callable[[int, list[Any], Refusal], None],
    ) -> None:
        self._pump, self._within_s, self._may_queue = pump, within_s, may_queue
        self._admit, self._refuse = admit, refuse
        self._lock = threading.Lock()
        self._rooms: dict[int, _Asked] = {}

    def ask(self, room: int, session: str, site: str, size_bytes: int, target: Any) -> None:
        """A peer of `site` has granted pages for so many bytes. Returns at once."""
        self._forget_stale()
        offer = self._pump.offer(site, size_bytes, self._within_s, may_queue=self._may_queue)
        with self._lock:
            asked = self._rooms.setdefault(room, _Asked())
            before = asked.offers.get(session)
            asked.offers[session], asked.targets[session] = offer, target
            asked.due_s = time.monotonic() + self._within_s
        if before is not None:
            self._pump.release(before)
        offer.add_callback(lambda offer: self._heard(room, session, offer))

    def _forget_stale(self) -> None:
        """End rooms whose time is over and whose first bytes never came: their request may never have, which
        SGLang doesn't say, and their promises would stand for ever.
        """
        now = time.monotonic()
        with self._lock:
            stale = {
                room: asked
                for room, asked in self._rooms.items()
                if asked.due_s < now and not asked.under_way
            }
            for room in stale:
                del self._rooms[room]
        for room, asked in stale.items():
            for offer in asked.offers.values():
                self._pump.release(offer)
            if asked.held:
                refusal = Refusal("its link's ledger gave it no place in time", K_RETRY_AFTER_S)
                self._refuse(room, list(asked.targets.values()), refusal)

    def hold(self, room: int) -> bool:
        """Whether prefill of the room must wait. If so `admit` or `refuse` follows, unless the room ends."""
        with self._lock:
            asked = self._rooms.get(room)
            if asked is None or _admitted(asked):
                return False
            asked.held = True
            return True

    def under_way(self, room: int) -> None:
        """Its first bytes are about to be handed over: from here on nothing is refused."""
        with self._lock:
            if asked := self._rooms.get(room):
                asked.under_way = True

    def offer_of(self, room: int, session: str) -> Offer | None:
        with self._lock:
            asked = self._rooms.get(room)
            return asked.offers.get(session) if asked else None

    def end(self, room: int) -> None:
        """The room is over, whatever its end: its promises serve others. Unknown ones are ignored."""
        with self._lock:
            asked = self._rooms.pop(room, None)
        for offer in asked.offers.values() if asked else ():
            self._pump.release(offer)

    def _heard(self, room: int, session: str, offer: Offer) -> None:
        refusal = None
        with self._lock:
            asked = self._rooms.get(room)
            if asked is None or asked.offers.get(session) is not offer:
                return
            if offer.verdict is Verdict.REFUSED:
                refusal = _refusal(offer)
            elif offer.late and not asked.under_way:
                finish_s = math.inf if offer.finish_in_s is None else offer.finish_in_s
                if time.monotonic() + finish_s > asked.due_s:
                    refusal = _refusal(offer)
            elif offer.verdict is Verdict.QUEUED:
                logger.info("prfaas: room %d waits for room on the link to %s", room, offer.site)
            if refusal is not None:
                del self._rooms[room]
            elif not (asked.held and _admitted(asked)):
                return
            asked.held = False
        if refusal is None:
            self._admit(room)
            return
        logger.warning("prfaas: room %d: %s", room, refusal.text)
        for other in asked.offers.values():
            self._pump.release(other)
        self._refuse(room, list(asked.targets.values()), refusal)

    def __len__(self) -> int:
        return len(self._rooms)


def _admitted(asked: _Asked) -> bool:
    return all(offer.verdict is Verdict.ADMITTED for offer in asked.offers.values())


def _refusal(offer: Offer) -> Refusal:
    why = "would be late: the link's estimate fell" if offer.late else str(offer.reason or "refused")
    retry_s = offer.finish_in_s if offer.late else offer.retry_after_s
    return Refusal(f"link to {offer.site}: {why}", K_RETRY_AFTER_S if retry_s is None else retry_s)
