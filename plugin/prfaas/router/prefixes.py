"""The prefix index as the router keeps it: fed by KV events and by prefill's answers, asked for each prompt.

KV events say nothing of the states of hybrid models. They are booked by the rule (routing.prefix_index): a
prefill server keeps one at the end of each prompt it has prefilled, and what it reports to have reused shows
where one was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from prfaas.config.router import Model, RouterConfig
from prfaas.model.ids import ModelId
from prfaas.router.fleet import ServerHandle
from prfaas.router.tokens import Hasher, Prompt
from prfaas.routing import KvEvent, PrefixIndex, block_hashes
from prfaas.routing.kv_events import BlockStored

log = logging.getLogger(__name__)

K_MOST_BLOCKS = 1 << 24
"""That one server may tell of: 2 GB of the index."""
K_SPARE_BLOCKS = 4096
"""Beyond twice its pool, for what is told before it is taken back."""


def hashers(config: RouterConfig) -> dict[str, Hasher | None]:
    """What hashes the blocks of each model's prompts; None where no server tells what it has."""
    heard = {
        model.name
        for model in config.models
        for _, server in config.servers()
        if server.kv_events is not None and (not server.models or model.name in server.models)
    }
    return {
        model.name: partial(block_hashes, block_tokens=model.page_tokens) if model.name in heard else None
        for model in config.models
    }


class Caches:
    """Told which server takes up which prompt, so that what its cache will have is known before it tells."""

    def on_dispatched(self, server: str, prompt: Prompt, cached_tokens: int) -> None:
        """It is sent there, and expected to reuse so many tokens."""

    def on_prefilled(self, server: str, prompt: Prompt, cached_tokens: int | None) -> None:
        """It has been computed there. May be told twice; cached_tokens is what the server says it reused."""

    def on_ended(self, server: str) -> None:
        """Once for each on_dispatched: the server has let it go, computed or not."""


class PrefixBook(Caches):
    """Who has which prefix. Of servers without KV events nothing is known, and nothing promised."""

    def __init__(self, config: RouterConfig, on_refused: Callable[[str], None] = lambda cause: None) -> None:
        self.index = PrefixIndex()
        self._models: dict[str, Model] = {}
        self._holders: dict[str, Model] = {}
        self._pools: dict[str, ServerHandle] = {}
        self._on_refused = on_refused
        self._odd: set[str] = set()
        """Servers of which it has been said."""
        self.apply(config)

    def apply(self, config: RouterConfig) -> list[str]:
        """Take over a configuration.

        The servers that have to be added again, for their caches are cut into other blocks, or used
        otherwise, than was believed; those that left are gone already.
        """
        self._models = {model.name: model for model in config.models}
        wrong = [name for name, model in self._holders.items() if self._cut(model) != self._cut_now(model)]
        for name in wrong:
            self.remove_server(name)
        for model in config.models:
            self.index.add_model(model.name, model.page_tokens)
        return wrong

    def _cut_now(self, model: Model) -> tuple[int, str] | None:
        found = self._models.get(model.name)
        return None if found is None else self._cut(found)

    @staticmethod
    def _cut(model: Model) -> tuple[int, str]:
        return model.page_tokens, model.layers

    def add_server(self, handle: ServerHandle) -> None:
        """A server whose events are about to be read. One that could serve several models isn't indexed."""
        names = handle.config.models or tuple(self._models)
        if len(names) != 1:
            return
        model = self._models[names[0]]
        self._holders[handle.name] = model
        self._pools[handle.name] = handle
        self.index.add_holder(
            handle.name,
            model.name,
            hybrid=model.layers == "hybrid",
            states_limit=handle.config.states_limit,
        )

    def remove_server(self, name: str) -> None:
        self._odd.discard(name)
        if self._holders.pop(name, None) is not None:
            del self._pools[name]
            self.index.remove_holder(name)

    def cached_tokens(self, model: ModelId, prompt: Prompt) -> Mapping[str, int]:
        """Usable prefix by server, 0 for those that are heard and have none."""
        if not prompt.block_hashes:
            return {}
        found = dict.fromkeys((name for name, one in self._holders.items() if one.name == model), 0)
        found.update(self.index.lookup(model, prompt.block_hashes, prompt.tokens))
        return found

    def on_dispatched(self, server: str, prompt: Prompt, cached_tokens: int) -> None:
        """A prompt is sent to a server, which is expected to reuse so much of it."""
        self.index.on_started(server, self._hash_at(server, prompt, cached_tokens))

    def on_ended(self, server: str) -> None:
        """A prompt that was told by on_dispatched is no longer under way there, prefilled or not."""
        self.index.on_ended(server)

    def on_prefilled(self, server: str, prompt: Prompt, cached_tokens: int | None) -> None:
        """A server has the whole prompt; cached_tokens is what it says it reused. May be told twice."""
        if server not in self._holders or not prompt.block_hashes:
            return
        used = self._hash_at(server, prompt, cached_tokens or 0)
        if used is not None:
            self.index.on_state(server, used)
        self.index.on_state(server, prompt.block_hashes[-1])

    def _hash_at(self, server: str, prompt: Prompt, tokens: int) -> int | None:
        """Of the block that ends there, if one does."""
        model = self._holders.get(server)
        if model is None or tokens <= 0 or tokens % model.page_tokens:
            return None
        blocks = tokens // model.page_tokens
        return prompt.block_hashes[blocks - 1] if blocks <= len(prompt.block_hashes) else None

    def on_events(self, server: str, events: Sequence[KvEvent]) -> None:
        self._check_size(server, events)
        self.index.apply(server, events)
        if self.index.blocks(server) > self._most_blocks(server):
            # Not all of it can be true, and nobody knows what of it is.
            self._on_refused("more than its pool")
            self.index.clear(server)

    def _check_size(self, server: str, events: Sequence[KvEvent]) -> None:
        """Say once of a server that its blocks are of another size than prompts are cut into: none counts."""
        model = self._holders.get(server)
        if model is None or server in self._odd:
            return
        sizes = {event.block_size for event in events if isinstance(event, BlockStored)}
        if odd := sizes - {model.page_tokens}:
            self._odd.add(server)
            self._on_refused("block size")
            log.warning(
                "%s: its KV events have blocks of %d tokens, page_tokens of model %s is %d, which must be "
                "its --page-size: nothing counts as cached there",
                server, odd.pop(), model.name, model.page_tokens,
            )  # fmt: skip

    def _most_blocks(self, server: str) -> int:
        """That its pool can hold, by its own word, and as many again."""
        pool_tokens = self._pools[server].reported.total_tokens if server in self._pools else None
        if pool_tokens is None:
            return K_MOST_BLOCKS
        return min(K_MOST_BLOCKS, 2 * pool_tokens // self._holders[server].page_tokens + K_SPARE_BLOCKS)

    def on_lost(self, server: str) -> None:
        self.index.clear(server)
