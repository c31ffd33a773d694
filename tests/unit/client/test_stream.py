"""Parsing servers' streams."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas_testbed.client.stream import Collected, EventParser, StreamError


@given(
    st.lists(st.binary(min_size=1, max_size=20).filter(lambda b: not set(b) & {10, 13}), max_size=6),
    st.data(),
)
def test_events_come_out_whole_however_the_bytes_are_cut(payloads: list[bytes], data: st.DataObject) -> None:
    wire = b"".join(b"data: " + payload + b"\n\n" for payload in payloads)
    parser, found = EventParser(), []
    while wire:
        cut = data.draw(st.integers(1, len(wire)))
        found += parser.feed(wire[:cut])
        wire = wire[cut:]
    assert found == [payload.strip() for payload in payloads]


def test_generate_counts_its_last_event() -> None:
    collected = Collected()
    for ids in ([5], [5, 6]):
        meta = {
            "output_token_logprobs": [[-0.5 * i, i, None] for i in ids],
            "cached_tokens": 3,
            "finish_reason": None,
        }
        collected.add(json.dumps({"text": "x", "output_ids": ids, "meta_info": meta}).encode())
    assert collected.output_ids == [5, 6]
    assert collected.logprobs == [-2.5, -3.0]
    assert collected.cached_tokens() == 3
    assert not collected.finished


def test_openai_pieces_add_up() -> None:
    collected = Collected()
    for text, reason in (("a", None), ("b", "stop")):
        choice = {"delta": {"content": text}, "finish_reason": reason}
        collected.add(json.dumps({"choices": [choice]}).encode())
    usage = {"prompt_tokens_details": {"cached_tokens": 7}}
    collected.add(json.dumps({"choices": [], "usage": usage}).encode())
    collected.add(b"[DONE]")
    assert (collected.text, collected.finished, collected.cached_tokens()) == ("ab", True, 7)


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense",
        b"[1]",
        json.dumps({"error": {"message": "no room"}}).encode(),
        json.dumps(
            {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort", "message": "gone"}}}
        ).encode(),
    ],
)
def test_errors_in_the_stream_are_errors(data: bytes) -> None:
    with pytest.raises(StreamError):
        Collected().add(data)
