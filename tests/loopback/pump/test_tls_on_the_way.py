"""Whatever is done to a TLS connection's bytes on their way, an end says an error or waits: what it has given
until then is what was sent, and the process goes on, its collector included.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import random
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prfaas.pump import keys, openssl

K_NOW = datetime.datetime.now(datetime.UTC)
K_DATA = random.Random(7).randbytes(40_000)
K_SHAKES_BYTES = 3_000
"""Most of what either sends before its data: half of all faults are among these."""
K_STILL_ROUNDS = 8
K_WANT = (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError)


@dataclass
class Fault:
    """What becomes of the byte `at` of one direction, and of those after it."""

    what: str
    at: int
    garbage: bytes

    def done_to(self, data: bytes) -> bytes:
        before, after = data[: self.at], data[self.at :]
        match self.what:
            case "flip":
                return before + bytes(b ^ g for b, g in zip(after, self.garbage, strict=False)) + after[8:]
            case "insert":
                return before + self.garbage + after
            case "drop":
                return before + after[len(self.garbage) :]
            case _:
                return before + after[:64] * 2 + after[64:]


class Way:
    """One direction in the middle."""

    def __init__(self, source: socket.socket, target: socket.socket, fault: Fault | None) -> None:
        self._source, self._target, self._fault = source, target, fault
        self._seen, self._left = 0, b""

    def turn(self) -> bool:
        """Whether anything moved."""
        moved = False
        with contextlib.suppress(OSError):
            if data := self._source.recv(8192):
                moved = True
                fault, seen = self._fault, self._seen
                self._seen += len(data)
                if fault is not None and seen <= fault.at < self._seen:
                    here = Fault(fault.what, fault.at - seen, fault.garbage)
                    data = data[: here.at] if fault.what == "cut" else here.done_to(data)
                    self._fault = None
                self._left += data
                if fault is not None and fault.what == "cut" and self._fault is None:
                    self._flush()
                    self._target.shutdown(socket.SHUT_WR)
        return self._flush() or moved

    def _flush(self) -> bool:
        with contextlib.suppress(OSError):
            n = self._target.send(self._left)
            self._left = self._left[n:]
            return n > 0
        return False


class Side:
    """An end that shakes hands, sends the data and reads the other's."""

    def __init__(self, end: openssl.DiallingEnd | openssl.ListeningEnd) -> None:
        self.end, self.got, self.error = end, bytearray(), None
        self._sent, self._shaken = 0, False
        self._buffer = memoryview(bytearray(9_000))
        self.end.sock.setblocking(False)

    def turn(self) -> bool:
        if self.error is not None:
            return False
        try:
            if not self._shaken:
                self.end.do_handshake()
                self._shaken = True
            return self._turn()
        except K_WANT:
            return False
        except OSError as error:  # ssl.SSLError is one
            self.error = error  # with its traceback, for the collector to find
            self.end.sock.close()
            return False

    def _turn(self) -> bool:
        before = (self._sent, len(self.got))
        if self._sent < len(K_DATA):
            with contextlib.suppress(*K_WANT):
                self._sent += self.end.send(memoryview(K_DATA)[self._sent :])
        self.end.flush()
        with contextlib.suppress(*K_WANT):
            n = self.end.recv_into(self._buffer)
            self.got += self._buffer[:n]
        return before != (self._sent, len(self.got))


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, openssl.Context]:
    folder: Path = tmp_path_factory.mktemp("keys")
    for name in ("east", "west", "stranger"):
        keys.create_site(folder / name, name, days=2, authority_days=3, now=K_NOW)
    for name, other in (("east", "west"), ("west", "east"), ("stranger", "west")):
        keys.trust(folder / name, folder / other / keys.K_AUTHORITY_CERTIFICATE)
    names = ("east", "west", "stranger")
    return {
        name: openssl.Context(folder / name / keys.K_SITE_FILE, [folder / name / keys.K_TRUSTED])
        for name in names
    }


@contextlib.contextmanager
def four_sockets() -> Iterator[list[socket.socket]]:
    """Of two connections: those of the ends, then those of the middle."""
    with contextlib.ExitStack() as stack:
        pairs = []
        for _ in range(2):
            with socket.create_server(("127.0.0.1", 0)) as listener:
                pairs.append((socket.create_connection(listener.getsockname()), listener.accept()[0]))
        found = [pairs[0][0], pairs[1][1], pairs[0][1], pairs[1][0]]
        for sock in found:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stack.callback(sock.close)
        yield found


def whole(sides: list[Side]) -> bool:
    return all(len(side.got) == len(K_DATA) for side in sides)


FAULTS = st.builds(
    Fault,
    what=st.sampled_from(("flip", "insert", "drop", "twice", "cut")),
    at=st.integers(0, K_SHAKES_BYTES) | st.integers(0, K_SHAKES_BYTES + len(K_DATA)),
    garbage=st.binary(min_size=8, max_size=300).filter(any),
)


@settings(max_examples=60)
@given(site=st.sampled_from(("east", "east", "stranger")), there=st.none() | FAULTS, back=st.none() | FAULTS)
def test_what_comes_is_what_was_sent_or_an_error_and_nothing_of_it_stays(
    contexts: dict[str, openssl.Context], site: str, there: Fault | None, back: Fault | None
) -> None:
    with four_sockets() as (dials, listens, near, far):
        sides = [
            Side(openssl.DiallingEnd(dials, contexts[site])),
            Side(openssl.ListeningEnd(listens, contexts["west"])),
        ]
        ways = [Way(near, far, there), Way(far, near, back)]
        clean = site != "stranger" and there is None and back is None
        still, give_up_s = 0, time.monotonic() + 5
        # Nothing says of bytes that were meddled with that no more will come of them: a few quiet rounds do.
        while still < K_STILL_ROUNDS or (clean and not whole(sides) and time.monotonic() < give_up_s):
            moved = [*(side.turn() for side in sides), *(way.turn() for way in ways)]
            still = 0 if any(moved) else still + 1
            if still:
                time.sleep(0.001)
        for side in sides:
            assert not isinstance(side.error, ssl.SSLError) or side.error.reason
            assert K_DATA.startswith(bytes(side.got))
            side.itself = side  # type: ignore[attr-defined]
        if site == "stranger":
            assert not sides[1].got
        assert whole(sides) or not clean
    del sides, side
    gc.collect()
