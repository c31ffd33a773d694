"""Where events end, and which first events are failures."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.router.sse import EventCutter, body_failure, first_event_failure

K_EVENTS = st.lists(st.text(alphabet='abc{}: "\\', max_size=20), max_size=8)


@given(texts=K_EVENTS, places=st.lists(st.integers(0, 500), max_size=10), done=st.booleans())
def test_whole_events_come_out_in_order_however_they_are_cut(
    texts: list[str], places: list[int], done: bool
) -> None:
    stream = b"".join(b"data: " + text.encode() + b"\n\n" for text in texts)
    stream += b"data: [DONE]\n\n" if done else b""
    ends = sorted({place % (len(stream) + 1) for place in places} | {0, len(stream)})
    cutter = EventCutter()
    out = [cutter.feed(stream[a:b]) for a, b in itertools.pairwise(ends)]
    assert b"".join(out) == stream
    assert all(not piece or piece.endswith(b"\n\n") for piece in out)
    assert cutter.done is done
    assert cutter.held_bytes == 0


def test_an_event_that_has_not_ended_is_held_back() -> None:
    cutter = EventCutter()
    assert cutter.feed(b"data: a\n\ndata: {half") == b"data: a\n\n"
    assert cutter.held_bytes == 11
    assert not cutter.done


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (b'data: {"text": "a", "meta_info": {"finish_reason": null}}\n\n', None),
        (b'data: {"choices": [{"delta": {"content": "the \\"error\\" is"}}]}\n\n', None),
        (b'data: {"meta_info": {"finish_reason": {"type": "abort", "message": "by the user"}}}\n\n', None),
        (
            b'data: {"meta_info": {"finish_reason": {"type": "abort", "status_code": 503}}}\n\n',
            503,
        ),
        (b'data: {"error": {"message": "no", "code": 500}}\n\ndata: [DONE]\n\n', 500),
        (b'data: {"error": "no"}\n\n', 500),
        (b"data: [DONE]\n\n", 502),
        (b'data: {"error": \n\n', 502),
        (b"<html>\n\n", 502),
    ],
)
def test_a_first_event_that_is_an_error_is_told_from_a_token(event: bytes, status: int | None) -> None:
    found = first_event_failure(event)
    assert (found.status if found else None) == status


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.dictionaries(
            st.sampled_from(
                ["error", "meta_info", "finish_reason", "type", "detail", "object", "code", "message"]
            ),
            inner | st.lists(inner, max_size=2),
            max_size=4,
        ),
        max_leaves=12,
    )
)
def test_any_json_is_an_answer_or_a_failure(value: object) -> None:
    found = body_failure(json.loads(json.dumps(value)))
    assert found is None or 400 <= found.status < 600
