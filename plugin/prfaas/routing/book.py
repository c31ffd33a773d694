"""What this policy has sent out and not yet seen arrive: it fills the gap between a load report and now.

A report older than a dispatch doesn't contain it; one that is younger does. So a site's backlog is what it
reported, less what it has worked off since, plus what was dispatched since. Bytes of requests that are
still being prefilled are in no link's backlog yet, but will be: until prefill is predicted to end, for its
server says so only once the bytes are across, and they would count twice for all the time that they wait.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush

from prfaas.model.decisions import PathPrediction
from prfaas.model.ids import LinkId, RequestId, SiteId
from prfaas.model.observations import SiteObservation


@dataclass(slots=True)
class _Sent:
    path: PathPrediction
    link: LinkId | None
    prefilling: bool = True


class DispatchBook:
    """Outstanding requests by site and link. Every entry ends by `drop`, which may be repeated."""

    def __init__(self) -> None:
        self._sent: dict[RequestId, _Sent] = {}
        self._recent: dict[SiteId, deque[tuple[float, float, RequestId]]] = {}
        self._coming_bytes: dict[LinkId, int] = {}
        self._coming: dict[LinkId, list[tuple[float, int, _Sent]]] = {}
        """By when each one's prefill is predicted to end: a heap."""
        self._serial = 0

    def __len__(self) -> int:
        return len(self._sent)

    def add(self, request: RequestId, path: PathPrediction, now: float) -> None:
        """A request left on `path`; an attempt of it that is still booked ends here."""
        self.drop(request)
        link = path.link
        self._sent[request] = sent = _Sent(path, link)
        recent = self._recent.get(path.prefill_site)
        if recent is None:
            recent = self._recent[path.prefill_site] = deque()
        recent.append((now, path.prefill_s, request))
        if link is not None:
            self._coming_bytes[link] = self.coming_bytes(link, now) + path.transfer_bytes
            ends_s = now + path.queue_s + path.move_s + path.prefill_s
            self._serial += 1
            heappush(self._coming.setdefault(link, []), (ends_s, self._serial, sent))

    def prefilled(self, request: RequestId) -> None:
        """Its bytes are in the link's backlog from now on, or through."""
        sent = self._sent.get(request)
        if sent is not None:
            self._prefilled(sent)

    def _prefilled(self, sent: _Sent) -> None:
        if sent.prefilling:
            sent.prefilling = False
            if sent.link is not None:
                self._coming_bytes[sent.link] -= sent.path.transfer_bytes

    def drop(self, request: RequestId) -> PathPrediction | None:
        """Forgets it; the path it was on, None if it wasn't booked."""
        sent = self._sent.get(request)
        if sent is None:
            return None
        self.prefilled(request)
        del self._sent[request]
        return sent.path

    def path(self, request: RequestId) -> PathPrediction | None:
        sent = self._sent.get(request)
        return None if sent is None else sent.path

    def backlog_s(self, site: SiteObservation, now: float) -> float:
        """Instance-seconds of prefill waiting at the site now, all instances together."""
        since_s = 0.0
        recent = self._recent.get(site.site)
        if recent:
            while recent and recent[0][0] <= site.at_s:
                recent.popleft()
            sent = self._sent
            for _, prefill_s, request in recent:
                if request in sent:
                    since_s += prefill_s
        waiting_s = site.prefill_backlog_s + since_s
        if now > site.at_s:
            waiting_s -= (now - site.at_s) * site.prefill_instances
        return waiting_s if waiting_s > 0.0 else 0.0

    def coming_bytes(self, link: LinkId, now: float) -> int:
        """Bytes that prefill has yet to hand to the link."""
        coming = self._coming.get(link)
        while coming and (coming[0][0] <= now or not coming[0][2].prefilling):
            self._prefilled(heappop(coming)[2])
        return self._coming_bytes.get(link, 0)
