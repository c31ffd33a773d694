"""One link, several pumps: expiring shares of its rate, whose sum never exceeds what the link is believed
to carry.

ShareBook   at the pump that hosts the link's ledger
ShareHolder at each pump that sends over the link, the host's own included

A floor is set aside for each of `max_pumps`, so that a pump that can't reach the book may still send: an
unknown or expired pump counts with its floor. Above that, demand is shared max-min. A share once granted
can't be taken back from a pump that may be out of reach: it counts until it expires, and what others get has
to fit beside it. A pump never goes back to an older grant, so those before the one that it says it holds
count no more: then what one gives up is another's after a report, not after a share's whole life.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prfaas.config.policy import LinkAdmission
from prfaas.model.errors import LocalProtocolError
from prfaas.model.ids import LinkId, PumpId

K_OVER = 1.1
"""How far above its share a pump may send: less would never show that a link carries more than was believed.
"""
K_PROBE_OVER = 1.25
"""The same while no queue shows on the way: the link carries more, and an estimate that fell is soon put
right.
"""
K_QUEUE_S, K_QUEUE_SHARE = 0.003, 0.1
"""A round trip that is longer than the shortest by this (or this share of it, if more) shows a queue."""
K_SERIAL_MOST = 1 << 62
"""No book comes to it; what is said to be larger is nonsense."""


def overstep(queue_s: float, min_rtt_s: float) -> float:
    """How many times its share a pump may send now. `queue_s`: how much longer than the shortest its round
    trips are.
    """
    return K_OVER if queue_s > max(K_QUEUE_S, K_QUEUE_SHARE * min_rtt_s) else K_PROBE_OVER


@dataclass(frozen=True, slots=True)
class Share:
    """What one pump may send until the share expires."""

    link: LinkId
    pump: PumpId
    rate_bps: float
    bytes: int
    """Most bytes under this grant: rate for its whole life."""
    ttl_s: float
    """Remaining life: crosses sites as seconds, each side counts on its own clock from receipt or sending."""
    floor_bps: float
    """What it may send after expiry without hearing from the book."""
    serial: int


@dataclass(slots=True)
class _Pump:
    demand_bps: float
    grants: list[tuple[float, float, int]]
    """(rate_bps, expires_s, serial), all that may be in use: an answer may be lost; then the one before is.
    """

    @property
    def committed_bps(self) -> float:
        return max((rate_bps for rate_bps, _, _ in self.grants), default=0.0)


class ShareBook:
    """Grants shares of one link. `before_serial`: its serials are larger, and are to be larger than those of
    any book of this link before it: who holds an older one's share takes no smaller serial. Where they aren't
    it goes on from the largest that it is told of. `opens_s`: until then it grants floors alone, for pumps
    may hold shares of a book before it, and have to say so first.
    """

    def __init__(
        self, link: LinkId, config: LinkAdmission, before_serial: int = 0, opens_s: float = -math.inf
    ) -> None:
        self.link = link
        self.config = config
        self._first_serial, self._opens_s = before_serial + 1, opens_s
        self._capacity_bps = config.nominal_bps
        self._grants: dict[PumpId, _Pump] = {}
        self._serial = before_serial

    @property
    def floor_bps(self) -> float:
        """Each pump's floor at the capacity believed now."""
        return self._capacity_bps * self.config.floor_share / self.config.max_pumps

    def set_capacity(self, usable_bps: float) -> None:
        """The estimate changed. Shares already granted stay until renewed or expired.

        New ones fit beside them.
        """
        self._capacity_bps = max(0.0, usable_bps)

    def renew(
        self, pump: PumpId, demand_bps: float, *, now: float, holds: int = 0, holds_bps: float = 0.0
    ) -> Share:
        """`pump` would like to send at demand_bps. `holds`: the serial of the share that it has, and its rate
        while it lives, as far as it says so.

        Raises LocalProtocolError when max_pumps others hold shares.
        """
        self._expire(now)
        if pump not in self._grants and len(self._grants) >= self.config.max_pumps:
            raise LocalProtocolError(
                f"{self.link}: {len(self._grants)} pumps share it already; {pump!r} refused"
            )
        demand_bps = max(0.0, demand_bps)
        grant = self._grants.setdefault(pump, _Pump(0.0, []))
        grant.demand_bps = demand_bps
        if self._first_serial <= holds <= self._serial:
            grant.grants = [one for one in grant.grants if one[2] >= holds]
        elif holds:  # another book's: this one learns of it here
            grant.grants = [one for one in grant.grants if one[2] > 0]
            if 0 < holds_bps < math.inf:
                grant.grants.append((holds_bps, now + self.config.share_ttl_s, 0))
            if self._serial < holds <= K_SERIAL_MOST:
                self._serial, self._first_serial = holds, holds + 1
        rate_bps = self.floor_bps
        if now >= self._opens_s:
            rate_bps = max(rate_bps, min(self._fair(pump), self._room_for(pump)))
        rate_bps = max(0.0, min(rate_bps, self._room_for(pump)))
        self._serial += 1
        grant.grants.append((rate_bps, now + self.config.share_ttl_s, self._serial))
        ttl_s = self.config.share_ttl_s
        return Share(
            link=self.link,
            pump=pump,
            rate_bps=rate_bps,
            bytes=int(rate_bps * ttl_s / 8),
            ttl_s=ttl_s,
            floor_bps=min(self.floor_bps, rate_bps),
            serial=self._serial,
        )

    def leave(self, pump: PumpId, *, now: float) -> None:
        """`pump` sends no more. Raises LocalProtocolError if it holds nothing."""
        self._expire(now)
        if self._grants.pop(pump, None) is None:
            raise LocalProtocolError(f"{self.link}: {pump!r} leaves, but holds no share")

    def promised_bps(self, now: float) -> float:
        """Sum of what all pumps may send now: live shares, and floors for the rest of max_pumps."""
        self._expire(now)
        live = sum(grant.committed_bps for grant in self._grants.values())
        return live + self.floor_bps * (self.config.max_pumps - len(self._grants))

    def statistics(self, now: float) -> Mapping[PumpId, float]:
        """Live shares, bits a second."""
        self._expire(now)
        return {pump: grant.committed_bps for pump, grant in self._grants.items()}

    def _expire(self, now: float) -> None:
        for pump, grant in list(self._grants.items()):
            grant.grants = [one for one in grant.grants if one[1] > now]
            if not grant.grants:
                del self._grants[pump]

    def _room_for(self, pump: PumpId) -> float:
        others = [grant.committed_bps for name, grant in self._grants.items() if name != pump]
        absent = self.config.max_pumps - 1 - len(others)
        return self._capacity_bps - sum(others) - self.floor_bps * absent

    def _fair(self, pump: PumpId) -> float:
        """Max-min share.

        Equal, but nobody gets more than it asked for, and what it leaves goes to the others.
        """
        absent = self.config.max_pumps - len(self._grants)
        left_bps = self._capacity_bps - self.floor_bps * absent
        by_demand = sorted(self._grants.items(), key=lambda item: item[1].demand_bps)
        share_bps = 0.0
        for index, (name, grant) in enumerate(by_demand):
            share_bps = max(self.floor_bps, min(grant.demand_bps, left_bps / (len(by_demand) - index)))
            if name == pump:
                break
            left_bps -= share_bps
        return share_bps


class ShareHolder:
    """What this pump may send over a link now.

    Its share while it lives, its floor afterwards, 0 before any.
    """

    def __init__(self, link: LinkId, pump: PumpId) -> None:
        self.link = link
        self.pump = pump
        self._share: Share | None = None
        self._expires_s = 0.0

    def on_share(self, share: Share, *, asked_s: float) -> None:
        """A grant arrived. Its life counts from when it was asked for, which is earlier than when it was
        granted: so it ends here no later than at the book. Older grants than the one held are ignored.
        """
        if self._share is not None and share.serial <= self._share.serial:
            return
        self._share = share
        self._expires_s = asked_s + share.ttl_s

    @property
    def serial(self) -> int:
        """Of the share that it has; 0 before any."""
        return self._share.serial if self._share is not None else 0

    def held_bps(self, now: float) -> float:
        """Of the share that it has, while it lives; 0 afterwards and before any."""
        return self._share.rate_bps if self._share is not None and now < self._expires_s else 0.0

    @property
    def has_share(self) -> bool:
        """Whether it ever had one."""
        return self._share is not None

    def rate_bps(self, now: float) -> float:
        if self._share is None:
            return 0.0
        return self._share.rate_bps if now < self._expires_s else self._share.floor_bps

    def renew_at(self, now: float) -> float:
        """When to ask again: half-way through the share's life, at once when there is none."""
        return now if self._share is None else self._expires_s - self._share.ttl_s / 2
