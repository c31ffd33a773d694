"""Addresses that a socket, an HTTP client or ZeroMQ would stumble over are refused with the file."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from prfaas.config.addresses import HostName, HttpPage, HttpServer, ZmqEndpoint


def accepts(kind: Any, value: str) -> bool:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (HttpServer, "http://10.0.0.1:30000"),
        (HttpServer, "https://[::1]:30000/"),
        (HttpServer, "http://prefill-0.prefill.svc"),
        (HttpPage, "https://pump.east:9000/links"),
        (ZmqEndpoint, "tcp://10.0.0.1:5557"),
        (ZmqEndpoint, "tcp://[fd00::1]:5557"),
        (ZmqEndpoint, "ipc:///run/kv events"),
        (HostName, "::"),
        (HostName, "0.0.0.0"),
    ],
)
def test_what_can_be_dialled_is_taken(kind: Any, value: str) -> None:
    assert accepts(kind, value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (HttpServer, "10.0.0.1:30000"),
        (HttpServer, "http://h:99999"),
        (HttpServer, "http://h:0"),
        (HttpServer, "http://h:http"),
        (HttpServer, "http://h:1/v1"),
        (HttpServer, "http://h:1?x"),
        (HttpServer, "http://h:1#x"),
        (HttpServer, "http://user:word@h:1"),
        (HttpServer, "http://h:1\r\nX: y"),
        (HttpServer, "http://a..b:1"),
        (HttpServer, "http://[::1"),
        (HttpServer, "http://exämple:1"),
        (HttpServer, "ftp://h:1"),
        (HttpPage, "links"),
        (ZmqEndpoint, "tcp://h"),
        (ZmqEndpoint, "tcp://*:x"),
        (ZmqEndpoint, "ipc://"),
        (ZmqEndpoint, "udp://h:1"),
        (HostName, ""),
        (HostName, "a b"),
        (HostName, "x" * 64 + ".org"),
    ],
)
def test_what_cannot_be_dialled_is_refused(kind: Any, value: str) -> None:
    assert not accepts(kind, value)


@given(st.text(max_size=40))
def test_any_text_is_taken_or_refused(value: str) -> None:
    for kind in (HttpServer, HttpPage, ZmqEndpoint, HostName):
        for text in (value, f"http://{value}", f"tcp://h:{value}"):
            accepts(kind, text)
