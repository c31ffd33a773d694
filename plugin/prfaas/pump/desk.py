"""One outgoing link of this pump: what is measured on it, this pump's share of its rate, and its ledger.

The pump that a site's configuration names keeps the ledger (admission/: estimate, promises, shares); the
site's other pumps reach it over their own streams, and report to it what they see. While it can't be reached
a pump uses no more than its floor, and promises against that alone.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prfaas.admission import Ledger, OfferBook, ShareHolder, Standing, overstep
from prfaas.config.pump import LinkConfig
from prfaas.model.decisions import Verdict
from prfaas.model.ids import LinkId
from prfaas.model.observations import LinkEstimate, LinkObservation
from prfaas.pump.answers import estimate_of, share_of
from prfaas.pump.ledger_host import LedgerHost, News, decision_body
from prfaas.pump.stream import Stream
from prfaas.transfer.frames import FrameType, LedgerMessage, control_frame, message_frame

if TYPE_CHECKING:
    from prfaas.pump.peer import Peer
    from prfaas.pump.server import Pump

log = logging.getLogger(__name__)

K_TICK_S = 0.1
K_SILENT_S = 1.0
"""A ledger's host that hasn't answered for so long can't be reached."""
K_OPENS_S = 3 * K_TICK_S
"""A ledger grants floors alone until every pump that it can hear has said which share it holds."""
K_BURST_S = 0.05
"""Of its rate a pump may catch up with, when it came late to its turn."""
K_HELD_SHARE = 0.1
K_STARVED_SHARE = 0.1
"""Of an interval in which there was nothing to send: more, and it doesn't show what the link carries."""
K_ENDLESS_BPS = 1e15


class LinkDesk:
    """See the module. `host` is the ledger when it is kept here."""

    def __init__(self, pump: Pump, config: LinkConfig, now: float) -> None:
        self.pump, self.config = pump, config
        self.link = LinkId(pump.config.site, config.peer_site)
        self.name = f"{pump.address}/{pump.boot.hex()[:8]}"
        elsewhere = config.host and config.host != pump.address
        milliseconds = time.time_ns() // 1_000_000
        self.host = None if elsewhere else LedgerHost(self.link, config, now, milliseconds, K_OPENS_S)
        self._fallback = Ledger(self.link, 0.0, queue_limit=config.admission.queue_limit)
        self._holder = ShareHolder(self.link, self.name)
        self._told: LinkEstimate | None = None
        self._news: dict[str, News] = {}
        self._book = OfferBook()
        """What was asked of a ledger that another pump keeps."""
        self._serial = 0
        self._asked: dict[int, float] = {}
        self._answered_s = -math.inf
        self._started_s = now
        self._early: dict[str, tuple[dict[str, Any], News, float]] = {}
        """Offers that wait for the ledger's first answer, and since when."""
        self._before = (0, 0, 0, 0)
        self._over = overstep(0.0, 0.0)
        self._at_s = now
        self._probe_s = now
        self._tokens_bytes = 0.0
        self._tokens_s = now
        self._held_s, self._held_until_s = 0.0, now
        """How long the share alone kept this pump from sending since the last look, and until when."""
        pump.loop.call_at(now, self._tick)

    # Rate

    def wait_s(self, now: float) -> float:
        """How long until this pump may send a block: 0 means now."""
        rate_bps = self._rate_bps(now)
        self._tokens_bytes = min(
            rate_bps / 8 * K_BURST_S, self._tokens_bytes + (now - self._tokens_s) * rate_bps / 8
        )
        self._tokens_s = now
        if self._tokens_bytes >= 0:
            return 0.0
        wait_s = min(0.1, -self._tokens_bytes * 8 / rate_bps) if rate_bps > 0 else 0.1
        self._held_s += max(0.0, now + wait_s - max(now, self._held_until_s))
        self._held_until_s = max(self._held_until_s, now + wait_s)
        return wait_s

    def spent(self, sent_bytes: int) -> None:
        self._tokens_bytes -= sent_bytes

    def _rate_bps(self, now: float) -> float:
        return self._over * max(self._holder.rate_bps(now), self._floor_bps)

    @property
    def _floor_bps(self) -> float:
        """What this pump may use before it has heard from the ledger."""
        admission = self.config.admission
        return admission.nominal_bps * admission.floor_share / admission.max_pumps

    def estimate(self, now: float) -> LinkEstimate | None:
        """What is believed of the link: by the ledger here, or as its host last said."""
        return self.host.estimator.estimate(now) if self.host else self._told

    def is_down(self, now: float) -> bool:
        """Whether the link is believed to be down."""
        estimate = self.estimate(now)
        return estimate is not None and not estimate.up

    def status(self, now: float) -> dict[str, Any]:
        """Share, estimate and promises, for figures."""
        estimate = self.estimate(now)
        ledger = self.host.ledger if self.host else self._fallback
        held = ledger.statistics()
        return {
            "link": str(self.link), "hosted": self.host is not None, "reachable": self._reachable(now),
            "share_bps": self._holder.rate_bps(now), "promised_bytes": held.promised_bytes,
            "admitted": held.admitted, "queued": held.queued, "late": held.late,
            "refusals": {k.value: v for k, v in held.refusals.items() if v},
            "shares_bps": dict(self.host.book.statistics(now)) if self.host else {},
            "promised_bps": self.host.book.promised_bps(now) if self.host else None,
            "believed_bps": self.host.believed_bps(now) if self.host else None,
            "estimate": {k: v for k, v in asdict(estimate).items() if k != "link"} if estimate else None,
        }  # fmt: skip

    # Offers of this pump's servers

    def offer(self, key: str, body: dict[str, Any], news: News, now: float) -> None:
        """Ask for a transfer's place. `news` hears the decision, and whatever changes it."""
        if self._just_started(now):
            self._early[key] = body, news, now
            return
        self._news[key] = news
        if self.host is not None:
            news(key, self.host.offer(self.name, key, body, news, now))
            return
        question = self._book.ask(key, body, now)
        if not (self._reachable(now) and self._ask(question, now)):
            self._decide_alone(key, question, now)

    def _decide_alone(self, key: str, question: dict[str, Any], now: float) -> None:
        """Promise against this pump's own share: the ledger can't be reached. It takes the promise over when
        it is back.
        """
        if self._holder.has_share:
            alone_bps = self._holder.rate_bps(now)
        else:
            alone_bps = self._floor_bps
        self._fallback.set_capacity(alone_bps, now=now)
        decision = self._fallback.offer(
            key, int(question["size_bytes"]), now + float(question["deadline_s"]), now=now, may_queue=False
        )
        if decision.verdict is Verdict.ADMITTED:
            self._book.decide(key, Standing.ADMITTED)
        else:
            self._book.drop(key)
        self._news[key](key, {**decision_body(decision), "alone": True})

    def _just_started(self, now: float) -> bool:
        """Whether this pump hasn't had the time yet to reach the ledger, which will most likely answer."""
        never = self.host is None and self._answered_s == -math.inf
        return never and now - self._started_s < K_SILENT_S

    def _offer_early(self, now: float) -> None:
        """Ask for what waited for the ledger's first answer, which has come or doesn't."""
        early, self._early = self._early, {}
        for key, (body, news, since_s) in early.items():
            self.offer(key, {**body, "deadline_s": body["deadline_s"] - (now - since_s)}, news, now)

    def progress(self, key: str, remaining_bytes: int, now: float) -> None:
        if self.host is not None:
            self.host.progress(key, remaining_bytes, now)
        else:
            self._book.progress(key, remaining_bytes)
            if self._fallback.holds(key) is not None:
                self._fallback.on_progress(key, remaining_bytes, now=now)

    def release(self, key: str, now: float) -> None:
        """The transfer is over or given up; unknown ones are ignored."""
        self._news.pop(key, None)
        self._early.pop(key, None)
        if self.host is not None:
            self.host.release(key, now)
            return
        said = self._book.drop(key)
        if said is not None:
            self._ask(said, now)
        if self._fallback.holds(key) is not None:
            self._fallback.release(key, now=now)

    # The host's side of the wire

    def on_question(self, stream: Stream, message: LedgerMessage, now: float) -> None:
        """Another pump of the site asks; only those of our own site may. Answers on the same stream."""
        host = self.host
        answer: dict[str, Any] = {"error": "the ledger isn't kept here"}
        if stream.peer_site != self.pump.config.site:
            answer = {"error": "another site's ledger"}
        elif host is not None:
            try:
                answer = host.answer(message.body, self._teller(stream.session), now)
            except (KeyError, TypeError, ValueError) as error:
                answer = {"error": f"not a question: {error}"}
        reply = LedgerMessage(str(self.link), False, message.serial, answer)
        stream.send_control(message_frame(stream.version, FrameType.LEDGER, reply))

    def _teller(self, session: object) -> News:
        """Says to the pump that asked what becomes of its offer, by whichever of its streams is there."""

        def news(key: str, what: dict[str, Any]) -> None:
            back = self.pump.inbound.any_stream(session)
            if back is not None:
                said = LedgerMessage(str(self.link), False, 0, {"op": "news", "key": key, **what})
                back.send_control(message_frame(back.version, FrameType.LEDGER, said))
                self.pump.loop.call_again(back, 2)

        return news

    # The asking side of the wire

    def _host_peer(self, now: float) -> Peer:
        return self.pump.peer(self.config.host, now)

    def _reachable(self, now: float) -> bool:
        return self.host is not None or now - self._answered_s < K_SILENT_S

    def _ask(self, body: dict[str, Any], now: float) -> bool:
        stream = next((s for s in self._host_peer(now).streams if s.ready), None)
        if stream is None:
            return False
        self._serial += 1
        self._asked[self._serial] = now
        question = LedgerMessage(str(self.link), True, self._serial, {**body, "pump": self.name})
        stream.send_control(message_frame(stream.version, FrameType.LEDGER, question))
        self.pump.loop.call_again(stream, 2)
        return True

    def asks(self, peer: Peer) -> bool:
        """Whether the peer is the pump of our own site that keeps this link's ledger."""
        return self.host is None and (peer.address, peer.site) == (self.config.host, self.pump.config.site)

    def on_answer(self, message: LedgerMessage, now: float) -> None:
        asked_s = self._asked.pop(message.serial, None)
        body = message.body
        if "error" in body:
            log.warning("link %s: %s", self.link, body["error"])
            return
        try:
            share: Any = body.get("share")
            if share and asked_s is not None:
                self._holder.on_share(share_of(self.link, share), asked_s=asked_s)
            estimate: Any = body.get("estimate")
            if estimate:
                self._told = estimate_of(self.link, estimate, now)
            news, again = self._book.hear(body, now)
        except (KeyError, TypeError, ValueError) as error:
            log.warning("link %s: not an answer: %r", self.link, error)
            return
        self._answered_s = now
        self._offer_early(now)
        for question in again:
            self._ask(question, now)
        for key, said in news:
            if self._fallback.holds(key) is not None:  # the ledger has taken it over
                self._fallback.release(key, now=now)
            tell = self._news.get(key)
            if tell is not None:
                tell(key, said)

    # Time

    def _tick(self, now: float) -> None:
        if now > self._at_s:
            seen, demand_bps = self._observe(now)
            serial, held_bps = holds = self._holder.serial, self._holder.held_bps(now)
            if self.host is not None:
                share = self.host.report(seen, demand_bps, now, holds)
                if share is not None:
                    self._holder.on_share(share, asked_s=now)
                self.host.tick(now)
            else:
                self._host_peer(now).prepare(now)
                fields = {k: v for k, v in asdict(seen).items() if k not in ("link", "at_s")}
                report = {
                    "op": "report", "seen": fields, "demand_bps": demand_bps, "holds": serial,
                    "holds_bps": held_bps, "page": self._book.page(),
                }  # fmt: skip
                self._ask(report, now)
                if self._early and not self._just_started(now):
                    self._offer_early(now)
                for serial in [n for n, at_s in self._asked.items() if now - at_s > 5.0]:
                    del self._asked[serial]
                if not self._reachable(now):
                    for key, question in self._book.unheard(now, K_SILENT_S):
                        self._decide_alone(key, question, now)
            self._probe(now)
        self.pump.loop.call_at(now + K_TICK_S, self._tick)

    def _probe(self, now: float) -> None:
        """Say something small to the peers of a link that is down: its acknowledgement is how one hears that
        the link is back, when what was under way has been given up (or waits for a peer that is lost for
        good) and nothing new is admitted.
        """
        every_s = self.config.admission.probe_every_s
        if not self.is_down(now):
            self._probe_s = now + every_s
        if now < self._probe_s:
            return
        self._probe_s = now + every_s
        for peer in self.pump.peers_of(self.config.peer_site):
            peer.prepare(now)
            for stream in peer.streams:
                if stream.ready:
                    stream.send_control(control_frame(stream.version, FrameType.PING, b""))
                    self.pump.loop.call_again(stream, 2)

    def _observe(self, now: float) -> tuple[LinkObservation, float]:
        peers = self.pump.peers_of(self.config.peer_site)
        totals = [peer.totals() for peer in peers]
        sums = (
            sum(t.bytes_acked for t in totals), sum(t.retransmitted_bytes for t in totals),
            sum(t.segments_out for t in totals), sum(t.streams_lost for t in totals),
        )  # fmt: skip
        delta = [max(0, a - b) for a, b in zip(sums, self._before, strict=True)]
        backlog = sum(p.sending.backlog_bytes + p.sending.in_flight_bytes for p in peers)
        rtts = [peer.rtt_s for peer in peers if peer.rtt_s]
        self._over = min((overstep(p.queue_s, p.min_rtt_s) for p in peers), default=overstep(0.0, 0.0))
        rates = [s.info.delivery_rate_bps for p in peers for s in p.streams if s.info]
        interval_s = now - self._at_s
        # Each peer's streams share the link: it was kept busy while one of them had something to send.
        starved_s = min((p.starved_s(now) for p in peers), default=interval_s)
        seen = LinkObservation(
            link=self.link, at_s=now, interval_s=interval_s, delivered_bytes=delta[0],
            backlog_bytes=backlog, rtt_s=min(rtts, default=None), retransmits=delta[1] // 1448,
            segments=delta[2], delivery_rate_bps=sum(rates) or None, failures=delta[3], sender=self.name,
            # What its share held back, or want of bytes, says nothing against the link.
            app_limited=self._held_s > K_HELD_SHARE * interval_s
            or starved_s > K_STARVED_SHARE * interval_s
            or all(p.app_limited for p in peers),
        )  # fmt: skip
        self._before, self._at_s, self._held_s = sums, now, 0.0
        return seen, K_ENDLESS_BPS if backlog else 0.0
