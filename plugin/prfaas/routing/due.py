"""What waits for prefill at each site, in order of service: whom a request would wait for, and whom delay.

A site's instances together are taken as one server that is so many times as fast but for the request's own
prefill: a request starts when the work before it, divided by the instances, is done. What a site has worked
off since a request was sent comes off those that are served first.
"""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import dataclass, field

from prfaas.model.ids import RequestId, SiteId


@dataclass(slots=True, order=True)
class Waiting:
    """One request that was sent to a site and isn't prefilled yet, as far as is known."""

    order_s: float
    serial: int
    request: RequestId = field(compare=False)
    prefill_s: float = field(compare=False)
    latest_s: float = field(compare=False)
    """When it must start for its first token to be in time; inf where that is given up."""


class DueQueue:
    """One site's."""

    def __init__(self) -> None:
        self.entries: list[Waiting] = []
        self.total_s = 0.0

    def ahead_s(self, order_s: float, backlog_s: float) -> float:
        """Instance-seconds of work that is served before `order_s`; backlog_s is all that is there.

        What others have sent there isn't known singly and counts as served before.
        """
        before_s = backlog_s - self.total_s
        for entry in self.entries:
            if entry.order_s > order_s:
                break
            before_s += entry.prefill_s
        return max(0.0, before_s)

    def hoped_s(self, backlog_s: float) -> float:
        """Instance-seconds of work that is still to be in time, of all that is there."""
        given_up_s = sum(entry.prefill_s for entry in self.entries if math.isinf(entry.latest_s))
        return max(0.0, backlog_s - given_up_s)

    def delayed(
        self, order_s: float, prefill_s: float, instances: int, backlog_s: float, now: float
    ) -> list[Waiting]:
        """Those that would come too late because of prefill_s more at `order_s`, and wouldn't otherwise."""
        found = []
        before_s = backlog_s - self.total_s
        for entry in self.entries:
            if entry.order_s > order_s and before_s + entry.prefill_s > 0:
                start_s = now + max(0.0, before_s) / instances
                if start_s <= entry.latest_s < start_s + prefill_s / instances:
                    found.append(entry)
            before_s += entry.prefill_s
        return found


class DueQueues:
    """All sites'. Every entry ends by `drop`, which may be repeated."""

    def __init__(self) -> None:
        self._sites: dict[SiteId, DueQueue] = {}
        self._where: dict[RequestId, tuple[SiteId, Waiting]] = {}
        self._serial = 0

    def at(self, site: SiteId) -> DueQueue:
        found = self._sites.get(site)
        if found is None:
            found = self._sites[site] = DueQueue()
        return found

    def add(
        self, request: RequestId, site: SiteId, order_s: float, prefill_s: float, latest_s: float
    ) -> None:
        self.drop(request)
        self._serial += 1
        entry = Waiting(order_s, self._serial, request, prefill_s, latest_s)
        queue = self.at(site)
        entries = queue.entries
        if not entries or entries[-1].order_s <= order_s:
            entries.append(entry)  # its serial is the highest
        else:
            insort(entries, entry)
        queue.total_s += prefill_s
        self._where[request] = (site, entry)

    def drop(self, request: RequestId) -> None:
        """It is prefilled, or goes elsewhere."""
        found = self._where.pop(request, None)
        if found is not None:
            site, entry = found
            queue = self._sites[site]
            queue.entries.remove(entry)
            queue.total_s = queue.total_s - entry.prefill_s if queue.entries else 0.0

    def __len__(self) -> int:
        return len(self._where)
