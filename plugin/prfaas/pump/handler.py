"""What a stream reports to: the side that understands its frames, and the counters they share."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from prfaas.pump.tcpinfo import TcpInfo
from prfaas.transfer.frames import Header, Hello

if TYPE_CHECKING:
    from prfaas.pump.stream import Stream


@dataclasses.dataclass(slots=True)
class Counters:
    """Bytes of one or of many streams, by what they are. Payload and framing are those of blocks."""

    blocks_received: int = 0
    blocks_sent: int = 0
    bytes_acked: int = 0
    control_bytes_received: int = 0
    control_bytes_sent: int = 0
    corrupt_blocks: int = 0
    framing_bytes_received: int = 0
    framing_bytes_sent: int = 0
    payload_bytes_received: int = 0
    payload_bytes_sent: int = 0
    retransmitted_bytes: int = 0
    segments_in: int = 0
    segments_out: int = 0
    streams_lost: int = 0
    streams_opened: int = 0
    tcp_bytes_received: int = 0
    tcp_bytes_sent: int = 0

    def add(self, other: Counters) -> None:
        for name in K_COUNTERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def take(self, info: TcpInfo) -> None:
        """What the kernel counts of one stream."""
        self.bytes_acked = info.acked_bytes
        self.retransmitted_bytes, self.tcp_bytes_sent = info.retransmitted_bytes, info.sent_bytes
        self.tcp_bytes_received = info.received_bytes
        self.segments_out, self.segments_in = info.segments_out, info.segments_in

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in K_COUNTERS}


K_COUNTERS = tuple(field.name for field in dataclasses.fields(Counters))


class Handler(ABC):
    """What owns streams and understands their frames."""

    @abstractmethod
    def check_certificate(self, certificate: Mapping[str, object]) -> str:
        """The site it proves. Raises RemoteProtocolError for one that isn't welcome."""

    @abstractmethod
    def our_hello(self, stream: Stream) -> Hello: ...

    @abstractmethod
    def on_hello(self, stream: Stream, hello: Hello) -> int:
        """The peer's first frame; the version agreed on. Raises RemoteProtocolError."""

    @abstractmethod
    def on_frame(self, stream: Stream, header: Header, body: memoryview, now: float) -> None:
        """A control frame. Raises RemoteProtocolError, which ends the stream."""

    @abstractmethod
    def on_block(self, stream: Stream, header: Header, body: memoryview, address: int, now: float) -> None:
        """A block whose checksum is right; its table is the start of `body`, which lies at `address`."""

    @abstractmethod
    def next_block(self, stream: Stream, now: float) -> int:
        """Put the next block, after its OPEN if need be, into stream.out_buffer and answer the bytes; 0:
        nothing to send.
        """

    def on_dry(self, stream: Stream, now: float) -> None:
        """The socket was full, and when it asked for more its kernel had nothing left to send."""
        return

    @abstractmethod
    def on_ready(self, stream: Stream, now: float) -> None: ...

    @abstractmethod
    def on_lost(self, stream: Stream, reason: str, now: float) -> None: ...
