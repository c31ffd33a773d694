"""Hashes of a prompt's blocks, as SGLang computes them for its KV events.

Each block's digest is SHA-256 over the digest before it and the block's token ids (32 bit, little endian);
the event carries its first eight bytes as a signed number. A hash therefore names the whole prefix up to
its block's end. Tokens that don't fill a block have no hash. Namespaces (cache salts, adapters) are not
reproduced: such prompts match nothing.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

K_TOKEN_BYTES = 4


def block_hashes(tokens: Sequence[int], block_tokens: int) -> tuple[int, ...]:
    """One signed 64-bit number per full block.

    Raises ValueError for block_tokens below 1 or a negative token.
    """
    if block_tokens < 1:
        raise ValueError(f"block_tokens is {block_tokens}; must be at least 1")
    try:
        raw = memoryview(array("I", tokens)).cast("B")
    except OverflowError:
        raise ValueError("a token id doesn't fit 32 bits unsigned") from None
    step = block_tokens * K_TOKEN_BYTES
    sha256, from_bytes = hashlib.sha256, int.from_bytes
    digest = b""
    hashes = []
    for start in range(0, len(tokens) // block_tokens * step, step):
        state = sha256(digest)
        state.update(raw[start : start + step])
        digest = state.digest()
        hashes.append(from_bytes(digest[:8], "big", signed=True))
    return tuple(hashes)
