"""One request with its time, as every kind of workload gives it."""

from __future__ import annotations

from prfaas.model.values import value


@value
class TimedRequest:
    """A request that arrives at `arrival_s` whatever became of those before it."""

    index: int
    """Its place in the order of arrival, from 0."""
    arrival_s: float
    """Since the workload's start."""
    prompt_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()
    """What the prompt's blocks contain: two prompts that have the same id at the same place agree on all
    tokens up to the block's end (the shorter one's end in its last, partial block). Empty: like no other."""
    block_tokens: int = 64
    """Tokens of a block; block i covers tokens [i × block_tokens, (i + 1) × block_tokens)."""
    session: int | None = None
    """Conversation that it is a turn of."""
    turn: int = 0
    tenant: str = ""
    slo_class: str = ""

    @property
    def full_blocks(self) -> tuple[int, ...]:
        """Ids of the blocks that the prompt fills: only these can be found in a prefix cache."""
        return self.block_ids[: self.prompt_tokens // self.block_tokens]
