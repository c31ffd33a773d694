"""A block as it leaves: its OPEN where the stream hasn't carried it, header, table and payload, in a stream's
own buffer.
"""

from __future__ import annotations

from prfaas.config.pump import FaultConfig
from prfaas.pump.memory import OwnerMemory
from prfaas.pump.stream import Stream
from prfaas.transfer.frames import K_HEADER_BYTES, FrameType, Header, Open, checksum, message_frame
from prfaas.transfer.plans import Piece
from prfaas.transfer.sending import Draw
from prfaas.transfer.tables import encode_table


class Packer:
    """Blocks to one peer, with the faults that tests ask for."""

    def __init__(self, faults: FaultConfig | None) -> None:
        self._faults = faults
        self._blocks = 0

    def pack(
        self, stream: Stream, draw: Draw, opening: Open | None, piece: Piece, memory: OwnerMemory,
        guard: tuple[int, int],
    ) -> int:  # fmt: skip
        """Put the block into stream.out_buffer; the bytes it takes there. Raises Withdrawn, Gone, or
        LocalProtocolError where the stream's version can't carry it.
        """
        table = encode_table(piece.destination, stream.version)
        buffer, at = stream.out_buffer, 0
        if opening is not None:
            frame = message_frame(stream.version, FrameType.OPEN, opening, draw.transfer_id)
            at = len(frame)
            buffer.view[:at] = frame
        body_at = at + K_HEADER_BYTES
        payload_at = body_at + len(table)
        end = payload_at + piece.payload_bytes
        memory.read(guard, piece.source, buffer.address + payload_at)
        buffer.view[body_at:payload_at] = table
        self._blocks += 1
        if self._is_due("drop_every_blocks"):
            buffer.view[payload_at:end] = bytes(piece.payload_bytes)
        crc = checksum(buffer.view[body_at:end])
        header = Header(
            stream.version,
            FrameType.BLOCK,
            0,
            end - body_at,
            len(table),
            draw.transfer_id,
            draw.block_id,
            crc,
        )
        buffer.view[at:body_at] = header.to_bytes()
        if self._is_due("corrupt_every_blocks"):
            buffer.view[end - 1] ^= 0x55
        counters = stream.counters
        counters.control_bytes_sent += at
        counters.framing_bytes_sent += K_HEADER_BYTES + len(table)
        counters.payload_bytes_sent += piece.payload_bytes
        counters.blocks_sent += 1
        return end

    def cuts_here(self) -> bool:
        """Whether the stream is to be cut in the block packed last."""
        return self._is_due("cut_every_blocks")

    def _is_due(self, fault: str) -> bool:
        every = getattr(self._faults, fault) if self._faults is not None else 0
        return bool(every) and self._blocks % every == 0
