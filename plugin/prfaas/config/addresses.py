"""Addresses in files: what a socket, an HTTP client or ZeroMQ would stumble over is the file's error."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator


def host_name(value: str) -> str:
    """The same. Raises ValueError for what no socket would take."""
    try:
        value.encode("ascii").decode("ascii").encode("idna")
    except UnicodeError:
        raise ValueError("expected a host's name or address in ASCII") from None
    if not value or any(character <= " " or character == "\x7f" for character in value):
        raise ValueError("expected a host's name or address")
    return value


def _parts(value: str, schemes: tuple[str, ...], expected: str) -> SplitResult:
    """Of an address with a host and nothing but printable ASCII. Raises ValueError."""
    if not value.isascii() or any(character <= " " or character == "\x7f" for character in value):
        raise ValueError(expected)
    try:
        parts = urlsplit(value)
        sound = parts.scheme in schemes and (parts.port is None or parts.port > 0)
        host_name(parts.hostname or "")
    except ValueError:
        raise ValueError(expected) from None
    if not sound or parts.username is not None or parts.password is not None:
        raise ValueError(expected)
    return parts


def _http_server(value: str) -> str:
    """Without the last slash. Raises ValueError."""
    expected = "expected http://HOST:PORT or https://HOST:PORT"
    parts = _parts(value, ("http", "https"), expected)
    if parts.path not in ("", "/") or parts.query or parts.fragment or value.endswith(("?", "#")):
        raise ValueError(expected)
    return value.rstrip("/")


def _http_page(value: str) -> str:
    """Raises ValueError."""
    _parts(value, ("http", "https"), "expected http://HOST:PORT/PAGE or https://HOST:PORT/PAGE")
    return value


def _zmq_endpoint(value: str) -> str:
    """Raises ValueError."""
    expected = "expected tcp://HOST:PORT or ipc://PATH"
    if value.startswith("ipc://") and len(value) > len("ipc://") and value.isprintable():
        return value
    parts = _parts(value, ("tcp",), expected)
    if parts.port is None or parts.path or parts.query or parts.fragment:
        raise ValueError(expected)
    return value


HostName = Annotated[str, AfterValidator(host_name)]
HttpServer = Annotated[str, AfterValidator(_http_server)]
HttpPage = Annotated[str, AfterValidator(_http_page)]
ZmqEndpoint = Annotated[str, AfterValidator(_zmq_endpoint)]
