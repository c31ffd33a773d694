"""What this router believes of the links: what a ledger's pump tells, or the configured figures; and its own
requests' failures, which it learns of before anybody's estimate can."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from prfaas.config.router import Link
from prfaas.model.ids import LinkId
from prfaas.model.observations import LinkEstimate

log = logging.getLogger("prfaas.router")

K_MAX_COOL_DOWN_S = 60.0
K_CARRIES_S = 1.0
"""A link that brought a first token so lately isn't down: what a request waits for then is its own server. If
the link is down after all, others' silence will say so."""


@dataclass(slots=True)
class LinkState:
    """One direction between two sites, as an operator would ask after it."""

    config: Link
    told: LinkEstimate | None = None
    """What the ledger's pump said last."""
    down_until_s: float = float("-inf")
    failures: int = 0
    """Attempts in a row that failed on it."""
    failed_at_s: float = float("-inf")
    """When the last of them did."""
    carried_at_s: float = float("-inf")
    """When a first token came by way of it last."""
    probing: int = 0
    """Requests on it since it was last down: until one succeeds, one at a time."""

    @property
    def link(self) -> LinkId:
        return LinkId(self.config.source, self.config.target)


class LinkBook:
    """All links of the configuration. `now` never goes back."""

    def __init__(self, *, cool_down_s: float, max_age_s: float) -> None:
        self._cool_down_s = cool_down_s
        self._max_age_s = max_age_s
        self._states: dict[LinkId, LinkState] = {}

    def apply(self, links: tuple[Link, ...], *, cool_down_s: float, max_age_s: float) -> None:
        """Take over a configuration; what is known of links that stay is kept."""
        self._cool_down_s, self._max_age_s = cool_down_s, max_age_s
        former = self._states
        self._states = {}
        for config in links:
            link = LinkId(config.source, config.target)
            state = former.get(link) or LinkState(config)
            state.config = config
            self._states[link] = state

    def states(self) -> list[LinkState]:
        return list(self._states.values())

    def tell(self, estimate: LinkEstimate) -> bool:
        """What a pump says; False: of a link that isn't configured."""
        state = self._states.get(estimate.link)
        if state is not None:
            if estimate.up is not (state.told is None or state.told.up):
                level = logging.INFO if estimate.up else logging.WARNING
                log.log(level, "link %s is %s, by its ledger", state.link, "up" if estimate.up else "down")
            state.told = estimate
        return state is not None

    def estimates(self, now: float) -> dict[LinkId, LinkEstimate]:
        """One for every configured link."""
        return {link: self._estimate(state, now) for link, state in self._states.items()}

    def _estimate(self, state: LinkState, now: float) -> LinkEstimate:
        config = state.config
        rate_bps = config.rate_mbps * 1e6
        found = state.told
        if found is None or now - found.at_s > self._max_age_s:
            found = LinkEstimate(
                link=state.link,
                at_s=now,
                rate_bps=rate_bps,
                low_bps=0.0,
                high_bps=rate_bps,
                rtt_s=config.rtt_ms / 1e3,
                reserved_bps=config.reserved_mbps * 1e6,
            )
        elif found.rtt_s <= 0:  # not measured yet
            found = replace(found, rtt_s=config.rtt_ms / 1e3)
        if now < state.down_until_s or (state.failures and state.probing):
            found = replace(found, up=False)
        return found

    def on_sent(self, link: LinkId) -> bool:
        """Whether the request is a probe: the link failed, and hasn't carried one since."""
        state = self._states.get(link)
        if state is None or not state.failures:
            return False
        state.probing += 1
        return True

    def on_succeeded(self, link: LinkId, now: float) -> None:
        """A first token by way of it: it carries, whatever became of others."""
        state = self._states.get(link)
        if state is not None:
            if state.failures:
                log.info("link %s carries again", state.link)
            state.failures, state.probing, state.carried_at_s = 0, 0, now
            state.down_until_s = float("-inf")

    def on_given_up(self, link: LinkId, *, probe: bool) -> None:
        """The attempt ended and says nothing of the link (the client left). A probe's place is free then;
        who was sent before the link failed had none.
        """
        state = self._states.get(link)
        if state is not None and probe:
            state.probing = max(0, state.probing - 1)

    def on_failed(
        self, link: LinkId, now: float, sent_s: float = float("inf"), *, silent: bool = False
    ) -> None:
        """Leave it alone for a while, longer each time, then try one request. An attempt that was sent before
        the last failure says nothing new, however late it fails. `silent`: nothing came, and nobody said why.
        """
        state = self._states.get(link)
        if state is None or sent_s < state.failed_at_s or (silent and now - state.carried_at_s < K_CARRIES_S):
            return
        state.probing = 0
        if now >= state.down_until_s:
            pause_s = min(K_MAX_COOL_DOWN_S, self._cool_down_s * 2**state.failures)
            state.down_until_s, state.failed_at_s = now + pause_s, now
            state.failures += 1
            log.warning("link %s rests for %g s: %d in a row failed on it", link, pause_s, state.failures)
