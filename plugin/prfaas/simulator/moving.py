"""Prefixes that are brought from one site's prefill cache to another's before their prompt is sent there, as
the router has servers do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from prfaas.model.decisions import CacheMove
from prfaas.model.ids import SiteId
from prfaas.simulator.agenda import Agenda
from prfaas.simulator.engine import Engine
from prfaas.simulator.live import Live
from prfaas.simulator.network import Network
from prfaas.simulator.pipes import Transfer

K_ROUND_TRIPS = 1.5
"""Before the first byte leaves: the taker opens a connection to the giver, and asks."""


class Movers:
    """All moves of a world."""

    def __init__(self, agenda: Agenda, network: Network, sites: Mapping[SiteId, Sequence[Engine]]) -> None:
        self._agenda, self._network, self._sites = agenda, network, sites

    def bring(
        self, live: Live, move: CacheMove, patience_s: float, then: Callable[[float], None], now: float
    ) -> None:
        """To the instance that is to prefill; `then(now)` once it is there, or isn't to be had in time."""
        taker, request = live.prefill, live.request
        assert taker is not None
        have = taker.cache.match(request.block_ids, request.prompt_tokens)
        able = (
            engine.up and engine.cache.match(request.block_ids, request.prompt_tokens) >= move.tokens
            for engine in self._sites.get(move.source, ())
        )
        if have >= move.tokens or not any(able):
            then(now)
            return
        size = taker.works.kv_bytes(move.tokens)
        if have:
            size -= taker.works.kv_bytes(have) - taker.profile.state_bytes

        def landed(at_s: float) -> None:
            if live.move is transfer:
                live.move, live.moved_tokens = None, move.tokens
                live.moved_bytes += size
                taker.cache.insert(request.block_ids, move.tokens, request.block_tokens)
                then(at_s)

        def start(at_s: float) -> None:
            if live.move is transfer:
                self._network.start(*move.link, transfer, at_s)
                self._network.supply(*move.link, transfer, size, at_s)

        def late(at_s: float) -> None:
            if live.move is transfer:
                self.drop(live, at_s)
                then(at_s)

        transfer = Transfer(size, now + patience_s, landed)
        live.move, live.move_link = transfer, move.link
        self._agenda.at(now + K_ROUND_TRIPS * self._network.rtt_s(*move.link), start)
        self._agenda.at(now + patience_s, late)

    def drop(self, live: Live, now: float) -> None:
        """It isn't waited for any more. Harmless where there is none."""
        if live.move is not None and live.move_link is not None:
            self._network.drop(*live.move_link, live.move, now)
            live.move = None
