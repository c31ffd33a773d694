"""A quicker way to the same token ids, for tokenizers of the kind that most models have: byte-level BPE.

The `tokenizers` library keeps where in the text each token came from, which routing doesn't ask; `tiktoken`
merges the same bytes by the same ranks in about a fifth of the time. Both agree where

* each merge makes a token of a higher id than the merges before it made, so that "the earliest merge first"
  and "the lowest id first" are one rule, and every token is a byte or made by a merge (a token's bytes merge
  in a text as they do alone, as long as nothing merges across its ends);
* a text is cut into words by one regular expression that leaves nothing out;
* added tokens are taken from the text as they stand, none being the beginning of another.

`quick_encoder` says None for whatever isn't plainly of that kind, and holds the two beside each other over
texts of many scripts before it says anything else.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import tiktoken
from tokenizers import Tokenizer

Encode = Callable[[str], list[int]]

K_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""How `ByteLevel` itself cuts a text."""
K_MAX_CHARACTERS = 200_000
"""Longer texts take the other way: from about 500,000 spaces in a row tiktoken's expressions overflow."""
K_TRIAL_TEXTS = 400
K_TRIAL_CHARACTERS = 48
_SNIPPETS = (
    "The quick brown fox", " isn't", " WE'LL", "they've", " 12", "3456789", "  ", "   \n", "\n\n", "\r\n",
    "\t", " \u00a0", "\u3000", "été", " e\u0301", "\u03a9", "\ufb01", "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u3053\u3093", "\ud55c\uad6d", "\u043f\u0440\u0438", "\u05e9\u05dc", "\u0627\u0644\u0639",
    "\u0939\u093f\u0928", "\u0e44\u0e17\u0e22", "\U0001f600", "\U0001f469\u200d\U0001f467", "\u200b",
    "\u0000", "\u2028", "x=f(a[i]);", "://", "--", "...", "²", "\u2166", "\u0663", "\ufffd", "\U0010ffff",
    "_", "'", "''s", "#", "</", "{%", "ß", "\u0130", "\u017f", " 'S", "\x85", "\x1c",
)  # fmt: skip
"""Words and what lies between them, of many scripts; what expressions for words tell apart."""


def quick_encoder(path: Path, slow: Tokenizer) -> Encode | None:
    """Text to ids as `slow`, which was read from `path`, gives them without special tokens around; or None.

    Takes a second for a large vocabulary. Several threads at once may call the function that comes back.
    """
    try:
        found = _build(msgspec.json.decode(path.read_bytes()))
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError):
        return None
    if found is None:
        return None
    encode, words = found
    for text in _trials(words):
        if encode(text) != slow.encode(text, add_special_tokens=False).ids:
            return None

    def either(text: str) -> list[int]:
        if len(text) > K_MAX_CHARACTERS:
            ids: list[int] = slow.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return ids
        return encode(text)

    return either


def _build(file: dict[str, Any]) -> tuple[Encode, list[str]] | None:
    """The encoder and its added tokens. Raises what a file of another form leads to."""
    composed = file["normalizer"] is not None
    if composed and file["normalizer"]["type"] != "NFC":
        return None
    pattern = _pattern(file["pre_tokenizer"])
    added = _added(file["added_tokens"], composed)
    if pattern is None or added is None:
        return None
    ranks = _ranks(file["model"], added)
    if ranks is None:
        return None
    core = tiktoken.Encoding("model", pat_str=pattern, mergeable_ranks=ranks, special_tokens=added)
    plain, whole, names = core.encode_ordinary, core.encode, set(added)
    between = re.compile("|".join(map(re.escape, added))) if added else None

    def encode(text: str) -> list[int]:
        if composed and not unicodedata.is_normalized("NFC", text):
            text = _composed(text, between)
        if between is None or between.search(text) is None:
            return plain(text)
        return whole(text, allowed_special=names, disallowed_special=())

    return encode, list(added)


def _composed(text: str, between: re.Pattern[str] | None) -> str:
    """In NFC, but for added tokens."""
    if between is None:
        return unicodedata.normalize("NFC", text)
    out, at = [], 0
    for found in between.finditer(text):
        out += [unicodedata.normalize("NFC", text[at : found.start()]), found[0]]
        at = found.end()
    return "".join([*out, unicodedata.normalize("NFC", text[at:])])


def _pattern(given: dict[str, Any]) -> str | None:
    """The regular expression whose matches are words."""
    if given["type"] == "ByteLevel":
        return K_GPT2 if given["use_regex"] and not given["add_prefix_space"] else None
    if given["type"] != "Sequence":
        return None
    split, last = given["pretokenizers"]
    if split["type"] != "Split" or split["behavior"] != "Isolated" or split["invert"]:
        return None
    if last["type"] != "ByteLevel" or last["use_regex"] or last["add_prefix_space"]:
        return None
    found: str = split["pattern"]["Regex"]
    return found


def _added(given: list[dict[str, Any]], composed: bool) -> dict[str, int] | None:
    """Tokens that are taken from the text before it is cut; None where some are taken otherwise."""
    added: dict[str, int] = {}
    for one in given:
        if one["single_word"] or one["lstrip"] or one["rstrip"] or not one["content"]:
            return None
        if one["normalized"] and composed:
            return None
        added[one["content"]] = one["id"]
    ordered = sorted(added)
    if any(later.startswith(first) for first, later in pairwise(ordered)):
        return None
    return added


def _ranks(model: dict[str, Any], added: dict[str, int]) -> dict[bytes, int] | None:
    """Ids by bytes, where merging by id is merging by rank."""
    if model["type"] != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    vocabulary: dict[str, int] = model["vocab"]
    made: set[str] = set()
    last = -1
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = left + right
        number = vocabulary[token]
        if number < last:
            return None
        last = number
        made.add(token)
    to_byte = {character: value for value, character in _byte_characters()}
    ranks = {}
    for token, number in vocabulary.items():
        if len(token) > 1 and token not in made:
            if token in added:
                continue
            # Never made by a merge; tiktoken would make it of its parts.
            return None
        ranks[bytes(to_byte[character] for character in token)] = number
    return ranks if all(bytes((value,)) in ranks for value in range(256)) else None


def _byte_characters() -> Iterator[tuple[int, str]]:
    """The visible character that stands for each byte in a vocabulary, as GPT-2 chose them."""
    shifted = 0
    for value in range(256):
        if 33 <= value <= 126 or 161 <= value <= 172 or 174 <= value <= 255:
            yield value, chr(value)
        else:
            yield value, chr(256 + shifted)
            shifted += 1


def _trials(added: list[str]) -> Iterator[str]:
    """Texts on which the two must agree, the same at every start."""
    drawn = random.Random(0)
    pieces = [*_SNIPPETS, *added[:32]]
    yield "".join(pieces)
    for _ in range(K_TRIAL_TEXTS):
        parts = drawn.choices(pieces, k=drawn.randrange(1, 12))
        size = drawn.randrange(K_TRIAL_CHARACTERS)
        top = drawn.choice((0x80, 0x250, 0x3000, 0xD800, 0x20000))
        parts.append("".join(chr(drawn.randrange(top)) for _ in range(size)))
        drawn.shuffle(parts)
        yield "".join(parts).encode("utf-8", "ignore").decode()
