"""Messages between a server's process and its pump, over a unix socket: a 4-byte length, then msgpack.

Arrays of addresses and lengths travel as the bytes of little-endian uint64, so that 100,000 segments are one
copy; where many small ones lie at equal distances, as runs of them (transfer/strides.py).
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from prfaas.model.errors import LocalProtocolError

K_LENGTH = struct.Struct("<I")
K_MESSAGE_MAX_BYTES = 256 << 20
K_CONTROL_VERSION = 2
K_GUARD_SLOTS = 65536


class Message(msgspec.Struct, tag_field="t", omit_defaults=True):
    """Base of all messages."""


# From the server


class Attach(Message, tag="attach"):
    """First message; the guard table's descriptor travels with it (SCM_RIGHTS)."""

    version: int
    name: str
    owner_token: bytes
    probe_address: int
    """Where `probe` lies in the server's memory: the pump tries to read it, to know whether it can."""
    probe: bytes


class Register(Message, tag="register"):
    serial: int
    addresses: bytes
    lengths: bytes


class Deregister(Message, tag="deregister"):
    serial: int
    addresses: bytes


class Grant(Message, tag="grant"):
    lease_id: int
    token: bytes
    room: int
    generation: int
    addresses: bytes
    lengths: bytes
    deadline_s: float
    site: str
    guard_slot: int
    guard_word: int


class Revoke(Message, tag="revoke"):
    lease_id: int


class Submit(Message, tag="submit"):
    transfer_id: int
    address: str
    room: int
    generation: int
    lease_id: int
    token: bytes
    window_bytes: int
    kind: str
    deadline_s: float
    sources: bytes
    destinations: bytes
    lengths: bytes
    guard_slot: int
    guard_word: int
    index: int = 0
    count: int = 0
    source: str = ""
    site: str = ""
    offer: str = ""
    """The offer that the ledger took, if any: its promise shrinks with what is acknowledged."""
    strides: bytes = b""
    """The segments as runs, instead of sources, destinations and lengths."""


class Offer(Message, tag="offer"):
    """Ask the ledger of the link to `site` for a place, before there are any bytes."""

    key: str
    site: str
    size_bytes: int
    deadline_s: float
    first_in_s: float
    ready_in_s: float
    may_queue: bool


class Release(Message, tag="release"):
    key: str


class Cancel(Message, tag="cancel"):
    transfer_id: int


class Prepare(Message, tag="prepare"):
    """Open the streams to a peer before the first transfer needs them."""

    address: str


class Expose(Message, tag="expose"):
    """Let other sites' programs reach an endpoint of this node, by their pumps and this one."""

    host: str
    port: int


class Forward(Message, tag="forward"):
    """Listen on loopback for an endpoint that a peer's node exposes; the reply's `address` says where."""

    serial: int
    peer: str
    """host:port of the peer's pump."""
    site: str
    """Its site, if only that one will do."""
    host: str
    port: int
    listen: str = "127.0.0.1:0"


class AskStats(Message, tag="stats"):
    serial: int


# From the pump


class OfferNews(Message, tag="offer_news"):
    """How an offer stands: admitted, queued, refused, or late."""

    key: str
    verdict: str
    reason: str = ""
    retry_after_s: float | None = None
    finish_in_s: float | None = None
    alone: bool = False
    """The ledger couldn't be reached: promised against this pump's floor."""


class Attached(Message, tag="attached"):
    version: int
    address: str
    site: str
    pump_pid: int
    boot: bytes
    block_bytes: int
    window_bytes: int


class Reply(Message, tag="reply"):
    serial: int
    error: str = ""
    body: dict[str, Any] = {}  # msgspec copies empty defaults


class Ended(Message, tag="ended"):
    """One of the server's transfers ended."""

    transfer_id: int
    ok: bool
    reason: str
    detail: str
    payload_bytes: int
    resent_blocks: int
    elapsed_s: float


class Arrived(Message, tag="arrived"):
    """A peer's transfer to one of the server's leases is whole, or has broken."""

    lease_id: int
    transfer_id: int
    kind: str
    index: int
    count: int
    source: str
    payload_bytes: int
    ok: bool
    reason: str
    detail: str


class Refused(Message, tag="refused"):
    """The pump ends the connection; why."""

    error: str


ToPump = (
    Attach | Register | Deregister | Grant | Revoke | Submit | Cancel | Prepare | AskStats | Offer | Release
    | Expose | Forward
)  # fmt: skip
ToServer = Attached | Reply | Ended | Arrived | Refused | OfferNews

_to_pump = msgspec.msgpack.Decoder(ToPump)
_to_server = msgspec.msgpack.Decoder(ToServer)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """As it goes over the socket. Raises LocalProtocolError for one that the other end would refuse."""
    body = _encoder.encode(message)
    if len(body) > K_MESSAGE_MAX_BYTES:
        raise LocalProtocolError(
            f"a message of {len(body) >> 20} MiB to the pump, and {K_MESSAGE_MAX_BYTES >> 20} are allowed: "
            "fewer segments in one call"
        )
    return K_LENGTH.pack(len(body)) + body


class Inbox:
    """Bytes as they come, cut into message bodies."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that are whole now. Raises ValueError for one that is too long."""
        self._data += data
        bodies = []
        at = 0
        while len(self._data) - at >= K_LENGTH.size:
            (length,) = K_LENGTH.unpack_from(self._data, at)
            if length > K_MESSAGE_MAX_BYTES:
                raise ValueError(f"a control message of {length} bytes")
            if len(self._data) - at - K_LENGTH.size < length:
                break
            at += K_LENGTH.size
            bodies.append(bytes(self._data[at : at + length]))
            at += length
        del self._data[:at]
        return bodies


def decode_to_pump(body: bytes) -> ToPump:
    """Raises msgspec.MsgspecError."""
    message: ToPump = _to_pump.decode(body)
    return message


def decode_to_server(body: bytes) -> ToServer:
    """Raises msgspec.MsgspecError."""
    message: ToServer = _to_server.decode(body)
    return message
