"""What a profiled instance moves and says; pure.

Its KV is real bytes that depend on the prompt alone, and its answers depend on the bytes that landed: were
one page of another request left in place, the digest and the tokens would both differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from crc32c import crc32c

K_VOCABULARY = 32000
K_PATTERN_BYTES = 1 << 20
K_STAMP_EVERY_BYTES = 4096  # each page carries its own mark
_PATTERN = np.random.default_rng(20260101).integers(0, 256, K_PATTERN_BYTES, dtype=np.uint8)


def prompt_seed(tokens: Sequence[int]) -> int:
    """A number of the whole prompt."""
    data = np.asarray(tokens, dtype=np.uint32).tobytes()
    return crc32c(data) << 32 | crc32c(data[::-1])


def fill(target: memoryview, seed: int, offset: int) -> None:
    """Write bytes [offset, offset + len(target)) of the request's KV. Pieces meet without a seam."""
    out = np.frombuffer(target, dtype=np.uint8)
    start = (offset + seed * 40503) % K_PATTERN_BYTES
    done = 0
    while done < len(out):
        piece = min(len(out) - done, K_PATTERN_BYTES - start)
        out[done : done + piece] = _PATTERN[start : start + piece]
        done += piece
        start = 0
    first = -(-offset // K_STAMP_EVERY_BYTES) * K_STAMP_EVERY_BYTES
    for at in range(first, offset + len(out) - 7, K_STAMP_EVERY_BYTES):
        mark = ((seed ^ at) & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little")
        out[at - offset : at - offset + 8] = np.frombuffer(mark, dtype=np.uint8)


def digest(data: memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def token(seed: int, damage: int, index: int) -> int:
    """Output token number `index`; `damage` is 0 where the right bytes landed."""
    return crc32c(f"{seed ^ damage}:{index}".encode()) % K_VOCABULARY


def damage(source_digest: str, landed_digest: str) -> int:
    """0 for equal digests, else a number that differs for different damage."""
    return int(source_digest, 16) ^ int(landed_digest, 16)


def text_tokens(text: str) -> list[int]:
    """A stand-in for a tokenizer: four bytes of text are one token."""
    data = text.encode()
    return [crc32c(data[i : i + 4]) % K_VOCABULARY for i in range(0, len(data), 4)]


def piece_of(token_id: int) -> str:
    """A token's text."""
    return f"w{token_id} "
