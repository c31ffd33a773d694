"""Token ids for a timed request, so that real servers find the prefixes that the workload means."""

from __future__ import annotations

from random import Random

from prfaas.workload.requests import TimedRequest


def prompt_token_ids(request: TimedRequest, vocab_size: int, seed: int = 0, low: int = 0) -> list[int]:
    """`prompt_tokens` ids in [low, vocab_size): the same for equal block ids, unlike any other else.

    Raises ValueError where the range is empty.
    """
    if not low < vocab_size:
        raise ValueError(f"no token id between {low} and {vocab_size}")
    choice = range(low, vocab_size)
    if not request.block_ids:
        return Random(f"{seed}/request/{request.index}").choices(choice, k=request.prompt_tokens)
    tokens: list[int] = []
    for block in request.block_ids:
        left = request.prompt_tokens - len(tokens)
        tokens += Random(f"{seed}/block/{block}").choices(choice, k=min(left, request.block_tokens))
    return tokens
