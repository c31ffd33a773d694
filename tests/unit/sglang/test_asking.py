"""Rooms that asked the ledger and were never heard of again."""

from __future__ import annotations

import time
from typing import Any

from prfaas.pump_client import Offer
from prfaas.sglang.asking import AskedRooms


class Pump:
    """Answers nothing, and notes what is released."""

    def __init__(self) -> None:
        self.released: list[Offer] = []

    def offer(self, site: str, size_bytes: int, within_s: float, *, may_queue: bool) -> Offer:
        return Offer(str(size_bytes), site)

    def release(self, offer: Offer) -> None:
        self.released.append(offer)


def asked(pump: Any, refused: list[int]) -> AskedRooms:
    return AskedRooms(
        pump, 0.05, True, lambda room: None, lambda room, targets, refusal: refused.append(room)
    )


def test_a_room_whose_time_is_over_gives_its_promise_back_and_one_that_waits_is_refused() -> None:
    pump, refused = Pump(), []
    rooms = asked(pump, refused)
    for room in (1, 2, 3):
        rooms.ask(room, "session", "west", room, ("10.0.2.2", 1))
    assert rooms.hold(2)  # its request has come, and waits for the ledger
    rooms.under_way(3)
    time.sleep(0.06)
    rooms.ask(4, "session", "west", 4, ("10.0.2.2", 1))
    assert [offer.key for offer in pump.released] == ["1", "2"]
    assert refused == [2]
    assert len(rooms) == 2
