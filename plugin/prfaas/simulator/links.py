"""What the deciding code hears of a simulated pipe: the same estimator and ledger that a real pump feeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

from prfaas.admission.estimator import LinkEstimator, LinkWentDown
from prfaas.admission.ledger import Ledger
from prfaas.config.policy import LinkAdmission
from prfaas.model.decisions import AdmissionDecision
from prfaas.model.ids import LinkId
from prfaas.model.observations import LinkEstimate, LinkObservation
from prfaas.simulator.agenda import Agenda
from prfaas.simulator.engine import Engine
from prfaas.simulator.flows import K_MSS_BYTES, payload_share
from prfaas.simulator.network import Network
from prfaas.simulator.pipes import Pipe

K_OBSERVE_S = 0.1  # a pump reports as often
K_TRANSFER_S = 60.0  # s after prefill by which a transfer must be through: what its ledger is asked for
K_NEWS = 0.01  # share by which a capacity must have moved before the ledger goes through its promises
K_UNLIMITED_BPS = 1e12  # what a link without a rate is said to carry


class WatchedLink:
    """One pipe's estimate, its ledger, and the reports that keep them fresh while there is news."""

    def __init__(
        self, pipe: Pipe, network: Network, agenda: Agenda, went_down: Callable[[Pipe, float], None]
    ) -> None:
        self.pipe, self.id = pipe, LinkId(pipe.source, pipe.target)
        self._network, self._agenda, self._went_down = network, agenda, went_down
        nominal = min(link.rate_bps for link in pipe.links) * payload_share()
        config = LinkAdmission(nominal_bps=nominal if 0 < nominal < math.inf else K_UNLIMITED_BPS)
        self._promised = 1 - config.headroom
        """Share of what is usable."""
        self.estimator = LinkEstimator(self.id, config, agenda.now)
        self.ledger = Ledger(self.id, config.nominal_bps * (1 - config.headroom), queue_limit=0)
        self.estimate: LinkEstimate = self.estimator.estimate(agenda.now)
        self.told: dict[LinkId, LinkEstimate] = {}
        """Where the door looks estimates up."""
        self._ticking = False
        self._told_bps = config.nominal_bps * (1 - config.headroom)
        self._sent_before = 0.0
        self._probe_bytes = 0
        """Of a probe that has crossed."""
        self._unanswered_bytes = 0
        """Of one that was sent over a link that rested, and hasn't."""

    def offer(self, key: Hashable, prefill: Engine, prompt_tokens: int, now: float) -> AdmissionDecision:
        """Ask the ledger for the place of what a prompt's prefill there will send."""
        works = prefill.works
        ready_s = now + prefill.backlog_s + works.prefill_s(prompt_tokens, 0)
        return self.ledger.offer(
            key,
            works.kv_bytes(prompt_tokens),
            ready_s + K_TRANSFER_S,
            now=now,
            first_s=ready_s,
            ready_s=ready_s,
            may_queue=False,
        )

    def wake(self, now: float) -> None:
        """The pipe has something to send, or has lost a link: report until neither is so."""
        if not self._ticking:
            self._ticking = True
            self._sent_before = self.pipe.sent_bytes
            self._agenda.at_in_background(now + K_OBSERVE_S, self._tick)

    def _tick(self, now: float) -> None:
        pipe, estimator = self.pipe, self.estimator
        self._network.settle(pipe, now)
        sent, found = pipe.sent_bytes, self._network.seen(pipe, now)
        delivered = round(sent - self._sent_before) + self._probe_bytes
        self._sent_before, self._probe_bytes = sent, 0
        if pipe.carries:
            self._unanswered_bytes = 0
        elif not pipe.rates and self.estimate.up and now >= estimator.probe_at(now):
            estimator.on_probe_sent(now)
            self._unanswered_bytes = estimator.probe_bytes(now)
            pipe.silent_since_s = pipe.silent_since_s or now
        backlog = round(pipe.backlog_bytes) + self._unanswered_bytes
        segments = delivered // K_MSS_BYTES
        seen = LinkObservation(
            self.id,
            now,
            K_OBSERVE_S,
            delivered,
            backlog,
            found.rtt_s,
            round(segments * found.loss) if found.loss else 0,
            segments,
            sender="simulated",
        )
        events = estimator.on_observation(seen)
        self.estimate = estimate = self.told[self.id] = estimator.estimate(now)
        capacity_bps = estimate.usable_bps * self._promised
        if abs(capacity_bps - self._told_bps) > K_NEWS * self._told_bps:
            self._told_bps = capacity_bps
            self.ledger.set_capacity(capacity_bps, now=now)
        for event in events:
            if isinstance(event, LinkWentDown):
                self._went_down(pipe, now)
        if not estimate.up and now >= estimator.probe_at(now):
            estimator.on_probe_sent(now)
            if pipe.carries:
                self._probe_bytes = estimator.probe_bytes(now)
        if backlog > 0 or pipe.transfers or not (estimate.up and pipe.carries):
            self._agenda.at_in_background(now + K_OBSERVE_S, self._tick)
        else:
            self._ticking = False
