"""What a link can carry now, from what transfers saw on it.

Bad news counts at once and good news slowly. Two averages follow the samples of a link that was kept busy: a
fast one (K_FAST_S) and a slow one (K_SLOW_S). While the fast one stays within the noise of the slow one,
the slow one is the estimate, so that the sawtooth of congestion control doesn't pull it down; once it falls
below the noise, the slow one is set to it. A sample from a sender that had too little to send, or was still
gathering speed, says only "at least this much": senders that keep to their shares of an estimate which is too
low can show no more, so such proof counts faster (K_PROOF_S) than other good news.

Silence with bytes under way for `outage_after_s` means down. A dead or idle link is known only by probes:
`probe_at` says when the next one is due and `probe_bytes` how large; the shell sends it and reports it as any
other transfer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prfaas.config.policy import LinkAdmission
from prfaas.model.ids import LinkId, PumpId
from prfaas.model.observations import LinkEstimate, LinkObservation

K_FAST_S = 0.25  # s, time constant for bad news
K_SLOW_S = 3.0  # s, time constant for good news
K_PROOF_S = 1.0  # s, time constant for what was delivered although the link wasn't the limit: that is proof
K_NOISE = 2.5  # mean deviations below the slow average that are news and not noise
K_NOISE_SHARE = (0.05, 0.3)  # least and most share of the rate that is taken for noise
K_FALL_GAP_S = 1.0  # s, falls closer than this are one event
K_WIDEN_S = 60.0  # s without a sample after which the band has doubled
K_SENDER_WINDOW_S = 0.6  # s, several senders' samples this fresh are one sum
K_RAMP_S = 0.2  # s of backlog before a sample may count as the link's limit, and the same in RTTs:
K_RAMP_RTTS = 4
K_RESTART_SHARE = 0.5  # share of the rate before an outage that is believed after it
K_PROBE_BYTES = (1 << 10, 1 << 20)  # bytes: a dead link's probe, the largest probe of an idle link
K_INTERVAL_S = (1e-4, 1e4)  # s: what an observation's interval may be
K_PROBE_S = 0.1  # s of the estimated rate that an idle link's probe carries


@dataclass(frozen=True, slots=True)
class LinkWentDown:
    link: LinkId
    at_s: float
    silent_s: float


@dataclass(frozen=True, slots=True)
class LinkCameUp:
    link: LinkId
    at_s: float
    down_s: float


@dataclass(frozen=True, slots=True)
class RateFell:
    """Bad news beyond the noise was believed at once."""

    link: LinkId
    at_s: float
    before_bps: float
    after_bps: float


EstimatorEvent = LinkWentDown | LinkCameUp | RateFell


@dataclass(slots=True)
class _Sender:
    at_s: float
    rate_bps: float
    busy: bool
    backlog_bytes: int
    busy_since_s: float
    """Start of the unbroken time with a backlog."""


class LinkEstimator:
    """Estimate of one link; many senders may report on it.

    `now` and `at_s` may repeat; a call that goes back in time is taken as having happened now.
    """

    def __init__(self, link: LinkId, config: LinkAdmission, now: float) -> None:
        self.link = link
        self.config = config
        self._now = now
        self._slow_bps = config.nominal_bps
        self._fast_bps = config.nominal_bps
        self._deviation_bps = config.nominal_bps * 0.25  # nothing was measured yet
        self._measured = False
        self._fell_s = -math.inf
        self._sample_at_s = now
        self._progress_at_s = now
        self._rtt_s: float | None = None
        self._loss = 0.0
        self._senders: dict[PumpId, _Sender] = {}
        self._down_since_s: float | None = None
        self._probe_at_s = now
        self._probe_gap_s = config.probe_every_s

    def on_observation(self, seen: LinkObservation) -> list[EstimatorEvent]:
        """Takes in one observation. Nonsense (negative counts, no interval, not finite) is ignored."""
        if not _sane(seen):
            return []
        now = self._now = max(self._now, seen.at_s)
        events: list[EstimatorEvent] = []
        rate_bps = seen.delivered_bytes * 8 / seen.interval_s
        before = self._senders.get(seen.sender)
        was_waiting = before is not None and before.backlog_bytes > 0
        since_s = before.busy_since_s if before is not None and was_waiting else now
        if seen.app_limited:
            since_s = now  # what comes next has to gather speed first
        # Something waiting at both ends of the interval, after the streams gathered speed: the link was the
        # limit.
        ramp_s = min(1.0, max(K_RAMP_S, K_RAMP_RTTS * (self._rtt_s or 0.0)))
        busy = was_waiting and seen.backlog_bytes > 0 and not seen.app_limited and now - since_s >= ramp_s
        self._senders[seen.sender] = _Sender(now, rate_bps, busy, seen.backlog_bytes, since_s)
        if seen.rtt_s is not None:
            self._rtt_s = (
                seen.rtt_s if self._rtt_s is None else self._rtt_s + (seen.rtt_s - self._rtt_s) * 0.25
            )
        if seen.segments:
            lost = min(1.0, seen.retransmits / seen.segments)
            if lost != self._loss:
                self._loss += (lost - self._loss) * _weight(seen.interval_s, K_SLOW_S / 3)
        if seen.delivered_bytes > 0:
            self._progress_at_s = now
            if self._down_since_s is not None:
                events += self._came_up(now)
            events += self._take_sample(seen, now)
        elif not was_waiting and seen.backlog_bytes > 0 and not self._waiting(except_for=seen.sender):
            self._progress_at_s = max(self._progress_at_s, now - seen.interval_s)  # silence begins here
        events += self.on_timer(now)
        return events

    def on_timer(self, now: float) -> list[EstimatorEvent]:
        """To be called often enough (every 0.1 s) that silence is noticed."""
        now = self._now = max(self._now, now)
        silent_s = now - self._progress_at_s
        if silent_s >= self.config.outage_after_s and self._down_since_s is None and self._waiting():
            self._down_since_s = now
            self._probe_gap_s = self.config.probe_every_s / 4
            self._probe_at_s = now + self._probe_gap_s
            return [LinkWentDown(self.link, now, silent_s)]
        return []

    def estimate(self, now: float) -> LinkEstimate:
        """What to believe at `now`."""
        now = max(self._now, now)
        up, slow_bps, config = self._down_since_s is None, self._slow_bps, self.config
        rate_bps = slow_bps if up else 0.0
        band = max(2 * self._deviation_bps, K_NOISE_SHARE[0] * slow_bps)
        band *= min(10.0, 1 + (now - self._sample_at_s) / K_WIDEN_S)
        low_bps = rate_bps - band
        reserved_bps = max(config.reserved_bps, config.reserved_share * rate_bps)
        # By place: one is made for every report.
        return LinkEstimate(
            self.link,
            now,
            rate_bps,
            low_bps if low_bps > 0.0 else 0.0,
            slow_bps + band,
            self._rtt_s or 0.0,
            self._loss,
            sum([sender.backlog_bytes for sender in self._senders.values()]),
            up,
            reserved_bps if reserved_bps < rate_bps else rate_bps,
        )

    def probe_at(self, now: float) -> float:
        """When a probe is due, unless a transfer runs before: a time in the past means now."""
        if self._down_since_s is None:
            return max(self._progress_at_s, self._probe_at_s - self._probe_gap_s) + self.config.probe_every_s
        return self._probe_at_s

    def probe_bytes(self, now: float) -> int:
        """Small on a dead link; on an idle one enough that its rate means something."""
        smallest, largest = K_PROBE_BYTES
        if self._down_since_s is not None:
            return smallest
        return int(min(largest, max(smallest, self._slow_bps / 8 * K_PROBE_S)))

    def on_probe_sent(self, now: float) -> None:
        """A probe is under way; the next one waits longer, up to probe_every_s."""
        if self._down_since_s is not None:
            self._probe_gap_s = min(self._probe_gap_s * 1.5, self.config.probe_every_s)
        self._probe_at_s = now + self._probe_gap_s

    def forget_sender(self, sender: PumpId) -> None:
        """A pump left: its backlog no longer counts."""
        self._senders.pop(sender, None)

    def get_log_data(self) -> Mapping[str, float]:
        return {
            "rate_bps": self._slow_bps,
            "fast_bps": self._fast_bps,
            "deviation_bps": self._deviation_bps,
            "rtt_s": self._rtt_s or 0.0,
            "loss": self._loss,
            "up": float(self._down_since_s is None),
        }

    def _waiting(self, except_for: PumpId | None = None) -> bool:
        return any(one.backlog_bytes > 0 and name != except_for for name, one in self._senders.items())

    def _came_up(self, now: float) -> list[EstimatorEvent]:
        assert self._down_since_s is not None  # or it can't
        down_s = now - self._down_since_s
        self._down_since_s = None
        self._slow_bps *= K_RESTART_SHARE
        self._fast_bps = self._slow_bps
        self._deviation_bps = max(self._deviation_bps, self._slow_bps / 2)
        self._probe_gap_s = self.config.probe_every_s
        self._probe_at_s = now
        return [LinkCameUp(self.link, now, down_s)]

    def _take_sample(self, seen: LinkObservation, now: float) -> list[EstimatorEvent]:
        sample_bps, fresh, busy = 0.0, 0, 0
        for one in self._senders.values():
            if now - one.at_s <= K_SENDER_WINDOW_S:
                sample_bps += one.rate_bps
                fresh += 1
                busy += one.busy
        if not busy:  # a lower bound at most
            if sample_bps > self._slow_bps:
                step_s = min(seen.interval_s, K_SENDER_WINDOW_S) / fresh
                self._slow_bps += (sample_bps - self._slow_bps) * _weight(step_s, K_PROOF_S)
                self._fast_bps = max(self._fast_bps, self._slow_bps)
            return []
        if not self._measured:  # the first true sample replaces the nominal figure, downwards only
            self._measured = True
            self._slow_bps = self._fast_bps = min(self._slow_bps, sample_bps)
            self._deviation_bps = sample_bps / 4
        self._sample_at_s = now
        step_s = min(seen.interval_s, K_SENDER_WINDOW_S) / busy
        self._fast_bps += (sample_bps - self._fast_bps) * _weight(step_s, K_FAST_S)
        least, most = K_NOISE_SHARE
        noise_bps = min(most * self._slow_bps, max(K_NOISE * self._deviation_bps, least * self._slow_bps))
        if self._fast_bps < self._slow_bps - noise_bps:
            before_bps, self._slow_bps = self._slow_bps, self._fast_bps
            self._deviation_bps = min(self._deviation_bps, self._slow_bps * least)
            news = now - self._fell_s >= K_FALL_GAP_S
            self._fell_s = now
            return [RateFell(self.link, now, before_bps, self._slow_bps)] if news else []
        error_bps = sample_bps - self._slow_bps
        self._slow_bps += error_bps * _weight(step_s, K_SLOW_S)
        # a long climb is not noise: its error is capped, or the next fall would hide in it
        spread_bps = min(abs(error_bps), self._slow_bps / 2)
        self._deviation_bps += (spread_bps - self._deviation_bps) * _weight(step_s, K_SLOW_S)
        return []


def _weight(step_s: float, constant_s: float) -> float:
    """Share of the way an average with this time constant goes in step_s."""
    return 1.0 - math.exp(-step_s / constant_s)


def _sane(seen: LinkObservation) -> bool:
    return (
        math.isfinite(seen.at_s)
        and K_INTERVAL_S[0] <= seen.interval_s <= K_INTERVAL_S[1]
        and seen.delivered_bytes >= 0
        and seen.backlog_bytes >= 0
        and seen.retransmits >= 0
        and seen.segments >= 0
        and (seen.rtt_s is None or (math.isfinite(seen.rtt_s) and seen.rtt_s >= 0))
    )
