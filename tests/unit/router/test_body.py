"""Clients' bodies: their own bytes reach the servers, ours win."""

from __future__ import annotations

import contextlib
import gzip
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas.router.body import Endpoint, read_body, unpacked, with_fields
from prfaas.router.errors import BadRequest

K_JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40)
@given(fields=st.dictionaries(st.text(max_size=6), K_JSON, max_size=5), indent=st.sampled_from([None, 1]))
def test_fields_are_appended_and_win_and_the_rest_is_untouched(
    fields: dict[str, Any], indent: int | None
) -> None:
    body = (json.dumps(fields, indent=indent) + " \n").encode()
    out = json.loads(with_fields(body, {"rid": "r", "bootstrap_room": 5}))
    assert out == {**fields, "rid": "r", "bootstrap_room": 5}


def test_the_clients_bytes_stay_as_they_are() -> None:
    body = b'{"prompt": "\\u00e9", "x": 1.10, "y": 12345678901234567890}'
    assert read_body(Endpoint.COMPLETIONS, body).body == body


def test_fields_that_only_the_router_may_set_are_taken_out() -> None:
    raw = b'{"text": "a", "bootstrap_room": 1, "rid": "x", "bootstrap_host": "h", "temperature": 0.5}'
    asked = read_body(Endpoint.GENERATE, raw)
    assert json.loads(asked.body) == {"text": "a", "temperature": 0.5}


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_bad_request(raw: bytes) -> None:
    for endpoint in Endpoint:
        with contextlib.suppress(BadRequest):
            read_body(endpoint, raw)


@pytest.mark.parametrize(
    ("endpoint", "fields", "tokens"),
    [
        (Endpoint.CHAT, {"messages": [{"role": "u"}], "max_tokens": 5}, 5),
        (Endpoint.CHAT, {"messages": [{"role": "u"}], "max_tokens": 5, "max_completion_tokens": 7}, 7),
        (Endpoint.COMPLETIONS, {"prompt": "x"}, None),
        (Endpoint.GENERATE, {"text": "x", "sampling_params": {"max_new_tokens": 9}}, 9),
        (Endpoint.GENERATE, {"text": "x", "sampling_params": [{"max_new_tokens": 9}]}, None),
        (Endpoint.GENERATE, {"text": "x", "sampling_params": {"max_new_tokens": True}}, None),
    ],
)
def test_the_output_bound_is_read_where_each_endpoint_has_it(
    endpoint: Endpoint, fields: dict[str, Any], tokens: int | None
) -> None:
    assert read_body(endpoint, json.dumps(fields).encode()).output_tokens == tokens


def test_a_body_is_unpacked_no_further_than_it_may_be_large() -> None:
    bomb = gzip.compress(b"x" * (64 << 20))
    tracemalloc.start()
    with pytest.raises(BadRequest) as refused:
        unpacked(bomb, "gzip", 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused.value.status == 413
    assert peak < 4 << 20
    assert unpacked(gzip.compress(b"x" * 1000) * 2, "gzip", 2000) == b"x" * 2000
    with pytest.raises(BadRequest):
        unpacked(gzip.compress(b"x" * 1000) * 2, "gzip", 1999)


def test_a_body_of_parts_without_end_is_refused() -> None:
    """16 MB of empty ones kept a thread busy for minutes."""
    part = gzip.compress(b"x")
    assert unpacked(part * 64, "gzip", 1000) == b"x" * 64
    with pytest.raises(BadRequest, match="64 parts"):
        unpacked(part * 64 + gzip.compress(b"") * 10_000, "gzip", 1000)


@given(st.binary(max_size=100), st.sampled_from(["gzip", "deflate", "identity", None, "x", ""]))
def test_any_bytes_in_any_coding_are_a_body_or_a_bad_request(raw: bytes, coding: str | None) -> None:
    with contextlib.suppress(BadRequest):
        unpacked(raw, coding, 1000)
