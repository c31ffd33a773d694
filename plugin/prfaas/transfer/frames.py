"""Frames between pumps: a fixed header, then a body whose length the header states.

    magic 4s | version B | type B | flags H | body_bytes I | table_bytes I | transfer_id Q | block_id I
    | body_crc I | header_crc I            little-endian, 36 bytes

A BLOCK's body is its table (where the bytes go, `segments.py`) and its payload. Its room, generation, lease
and token are those of the OPEN with the same transfer_id, which a sender repeats on every stream before the
transfer's first block there, so that no stream waits for another. Other bodies are msgpack maps: unknown
fields are ignored, missing ones take defaults, which is what lets versions N and N-1 talk. HELLO is always
sent in version 1's form.

A wrong header CRC, magic, version or length ends the stream (RemoteProtocolError): framing is lost. A wrong
body CRC costs the block only.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple, TypeVar

import crc32c as _crc
import msgspec

from prfaas.model.errors import RemoteProtocolError

K_MAGIC = b"PRFA"
K_HEADER = struct.Struct("<4sBBHIIQII")
K_HEADER_BYTES = K_HEADER.size + 4
K_CRC = struct.Struct("<I")
K_ACK = struct.Struct("<QI")
K_VERSION_OLDEST = 1
K_VERSION_NEWEST = 3
K_HELLO_VERSION = 1
K_CONTROL_MAX_BYTES = 64 * 1024
K_BLOCK_MAX_BYTES = 4 << 20
K_TABLE_MAX_BYTES = 128 * 1024
K_ACKS_PER_FRAME = 4096


class FrameType(IntEnum):
    HELLO = 1
    OPEN = 2
    BLOCK = 3
    ACK = 4
    NACK = 5
    REFUSE = 6
    CANCEL = 7
    WINDOW = 8
    PING = 9
    PONG = 10
    LEDGER = 11
    FORWARD = 12
    DATA = 13


class Hello(msgspec.Struct, omit_defaults=True):
    """First frame on a stream, both ways."""

    oldest: int
    newest: int
    boot: bytes
    """Random at the pump's start: another value at the same address is another pump, which knows no transfer.
    """
    site: str
    advertise: str
    stream: int
    max_block_bytes: int = K_BLOCK_MAX_BYTES
    forwarding: bool = False
    """Whether the stream carries one forwarded connection, and nothing of the pumps' own."""


class Open(msgspec.Struct, omit_defaults=True):
    """What the transfer is and by what right it writes; lease_id 0: registered raw memory."""

    room: int
    generation: int
    lease_id: int
    token: bytes
    kind: str
    total_bytes: int
    n_blocks: int
    deadline_s: float
    """Seconds left."""
    index: int = 0
    """Its place among the transfers of this source to this lease, from 0."""
    count: int = 0
    """How many transfers this source makes to this lease; 0: not yet known."""
    source: str = ""
    """The sender's own name among several that fill one lease (a rank)."""


class Refuse(msgspec.Struct, omit_defaults=True):
    reason: str
    detail: str = ""


class Window(msgspec.Struct, omit_defaults=True):
    lease_id: int
    window_bytes: int


class LedgerMessage(msgspec.Struct, omit_defaults=True):
    """A question to, or an answer of, the pump that hosts a link's ledger."""

    link: str
    request: bool
    serial: int
    body: dict[str, object] = {}  # msgspec copies empty defaults


class Forward(msgspec.Struct, omit_defaults=True, frozen=True):
    """From here on the stream carries one connection (DATA frames), to an endpoint that the peer's node
    exposes.
    """

    host: str
    port: int


class Header(NamedTuple):
    """Made for each block at both ends, as cheaply as can be."""

    version: int
    type: FrameType
    flags: int
    body_bytes: int
    table_bytes: int
    transfer_id: int
    block_id: int
    body_crc: int

    def to_bytes(self) -> bytes:
        packed = K_HEADER.pack(
            K_MAGIC, self.version, self.type, self.flags, self.body_bytes, self.table_bytes,
            self.transfer_id, self.block_id, self.body_crc,
        )  # fmt: skip
        return packed + K_CRC.pack(_crc.crc32c(packed))

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, version: int | None) -> Header:
        """The header in `data`. `version`: what the stream agreed on; None before HELLO, when only HELLO may
        come.

        Raises RemoteProtocolError.
        """
        if len(data) != K_HEADER_BYTES:
            raise RemoteProtocolError(f"a header has {K_HEADER_BYTES} bytes, not {len(data)}")
        magic, found, kind, flags, body, table, transfer, block, body_crc = K_HEADER.unpack_from(data)
        if magic != K_MAGIC:
            raise RemoteProtocolError("bad magic")
        if K_CRC.unpack_from(data, K_HEADER.size)[0] != _crc.crc32c(memoryview(data)[: K_HEADER.size]):
            raise RemoteProtocolError("bad header checksum")
        try:
            frame = FrameType(kind)
        except ValueError:
            raise RemoteProtocolError(f"unknown frame type {kind}") from None
        if (frame is FrameType.HELLO) != (version is None):
            raise RemoteProtocolError(f"{frame.name} out of place")
        if found != (K_HELLO_VERSION if version is None else version):
            raise RemoteProtocolError(f"version {found} where {version or K_HELLO_VERSION} was agreed")
        if frame is FrameType.BLOCK:
            payload = body - table
            if not 0 < table <= K_TABLE_MAX_BYTES or not 0 < payload <= K_BLOCK_MAX_BYTES:
                raise RemoteProtocolError(f"block of {body} bytes with a table of {table}")
        elif body > K_CONTROL_MAX_BYTES or table:
            raise RemoteProtocolError(f"{frame.name} of {body} bytes")
        return cls(found, frame, flags, body, table, transfer, block, body_crc)


def checksum(data: bytes | bytearray | memoryview) -> int:
    """CRC32C (Castagnoli), by the processor's instruction where it has one."""
    return _crc.crc32c(data)


def control_frame(
    version: int, kind: FrameType, body: bytes, transfer_id: int = 0, block_id: int = 0
) -> bytes:
    """A whole frame that isn't a BLOCK."""
    header = Header(version, kind, 0, len(body), 0, transfer_id, block_id, checksum(body))
    return header.to_bytes() + body


def message_frame(version: int, kind: FrameType, message: msgspec.Struct, transfer_id: int = 0) -> bytes:
    return control_frame(version, kind, msgspec.msgpack.encode(message), transfer_id)


M = TypeVar("M", bound=msgspec.Struct)


def decode_message(body: bytes | bytearray | memoryview, kind: type[M]) -> M:
    """The body as a message. Raises RemoteProtocolError."""
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"{kind.__name__}: {error}") from None


def ack_body(blocks: list[tuple[int, int]]) -> bytes:
    """(transfer_id, block_id) pairs, at most K_ACKS_PER_FRAME."""
    return b"".join([K_ACK.pack(transfer, block) for transfer, block in blocks])


def ack_frames(version: int, blocks: list[tuple[int, int]]) -> list[bytes]:
    """ACK frames for all of the pairs."""
    parts = [blocks[at : at + K_ACKS_PER_FRAME] for at in range(0, len(blocks), K_ACKS_PER_FRAME)]
    return [control_frame(version, FrameType.ACK, ack_body(part)) for part in parts]


def decode_acks(body: bytes | bytearray | memoryview) -> list[tuple[int, int]]:
    """Inverse of ack_body. Raises RemoteProtocolError."""
    if not body or len(body) % K_ACK.size:
        raise RemoteProtocolError(f"acknowledgements of {len(body)} bytes")
    return [(transfer, block) for transfer, block in K_ACK.iter_unpack(body)]


def agree_version(ours: tuple[int, int], theirs: tuple[int, int]) -> int:
    """The newest version both speak; each pair is (oldest, newest). Raises RemoteProtocolError if there is
    none.
    """
    version = min(ours[1], theirs[1])
    if version < max(ours[0], theirs[0]) or theirs[0] > theirs[1]:
        raise RemoteProtocolError(
            f"we speak versions {ours[0]}..{ours[1]}, the peer {theirs[0]}..{theirs[1]}"
        )
    return version
