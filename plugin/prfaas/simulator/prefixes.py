"""What the door knows of the engines' prefix caches: the router's own index, fed by the caches' events.

The news of an engine take a while to the door (`delay_s`), so that the index may promise what has gone and
miss what has come; what an engine really finds is settled when it takes the request up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from prfaas.model.ids import InstanceId
from prfaas.routing.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from prfaas.routing.prefix_index import PrefixIndex
from prfaas.simulator.cache import Key
from prfaas.simulator.engine import Engine
from prfaas.workload.requests import TimedRequest

K_MODEL = ""  # the simulated door serves one
K_PLACE_BITS = 24  # of a block's hash: its place in the prompt


def block_hash(place: int, block: int) -> int:
    """The chained hash that a server would give the block: its id stands for all before it at this place."""
    return block << K_PLACE_BITS | place


class HeardPrefixes:
    """The index and the news on their way to it."""

    def __init__(self, engines: Iterable[Engine], clock: Callable[[], float], delay_s: float) -> None:
        self.index: PrefixIndex | None = None
        """None until the first news: then the size of a block is known."""
        self._clock, self._delay_s = clock, delay_s
        self._engines = [engine for engine in engines if engine.role != "decode"]
        self._on_their_way: deque[tuple[float, InstanceId, KvEvent, int | None]] = deque()
        for engine in self._engines:
            self._listen(engine)

    def join(self, engine: Engine) -> None:
        """One that decoded until now will prefill."""
        if engine not in self._engines:
            self._engines.append(engine)
            self._listen(engine)
            if self.index is not None:
                self.index.add_holder(engine.name, K_MODEL, hybrid=engine.cache.exact)

    def _listen(self, engine: Engine) -> None:
        def heard(stored: Sequence[Key], removed: Sequence[Key], state: Key | None) -> None:
            due_s = self._clock() + self._delay_s
            saved = None if state is None else block_hash(*state)
            if stored or saved is not None:
                hashes = [block_hash(*key) for key in stored]
                event = BlockStored(hashes, engine.cache.block_tokens)
                self._on_their_way.append((due_s, engine.name, event, saved))
            if removed:
                gone = BlockRemoved([block_hash(*key) for key in removed])
                self._on_their_way.append((due_s, engine.name, gone, None))

        def cleared() -> None:
            self._on_their_way.append((self._clock() + self._delay_s, engine.name, AllBlocksCleared(), None))

        engine.cache.on_change, engine.cache.on_clear = heard, cleared

    def usable(self, request: TimedRequest, now: float) -> dict[InstanceId, int]:
        """Tokens of its prompt that each engine is believed to have; engines without any aren't listed."""
        while self._on_their_way and self._on_their_way[0][0] <= now:
            _, name, event, state = self._on_their_way.popleft()
            index = self._index_for(event)
            if index is not None:
                index.apply(name, [event])
                if state is not None:
                    index.on_state(name, state)
        if self.index is None or not request.block_ids:
            return {}
        hashes = [block_hash(place, block) for place, block in enumerate(request.full_blocks)]
        return self.index.lookup(K_MODEL, hashes, request.prompt_tokens)

    def _index_for(self, event: KvEvent) -> PrefixIndex | None:
        if self.index is None and isinstance(event, BlockStored):
            self.index = PrefixIndex()
            self.index.add_model(K_MODEL, event.block_size)
            for engine in self._engines:
                self.index.add_holder(engine.name, K_MODEL, hybrid=engine.cache.exact)
        return self.index
