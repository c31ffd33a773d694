"""Sender and receiver joined by a simulated wire that cuts, stalls, reorders between streams, corrupts and
restarts.

Hypothesis chooses the interleaving; memory is a bytearray on each side. Whatever happens: nothing is written
to a lease that has ended, success means that every byte is there, each transfer ends once, no more than the
window is in flight, and when the faults stop everything that can complete does.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prfaas.model.transfer import FailureReason
from prfaas.transfer import frames as f
from prfaas.transfer.plans import Blocks, Plan, StridedPlan
from prfaas.transfer.receiving import Apply, Broken, Known, Lease, Received, Receiving
from prfaas.transfer.segments import Ranges
from prfaas.transfer.sending import Completed, Failed, Sending
from prfaas.transfer.strides import Pieces, StridedSegments, rows_of
from prfaas.transfer.tables import decode_table, encode_table

K_LEASE_BYTES = 4096
K_BLOCK = 512
K_WINDOW = 2 * K_BLOCK
K_BASE = 1 << 40
K_STREAMS = 3
K_VERSION = f.K_VERSION_NEWEST


def each(pieces: Pieces) -> list[list[int]]:
    rows: list[list[int]] = rows_of(pieces).tolist()
    return rows


@dataclass
class Transferring:
    transfer_id: int
    lease_id: int
    plan: Blocks
    segments: list[tuple[int, ...]]
    opening: f.Open
    deadline_s: float
    ended: list[object] = field(default_factory=list)


class Wire(RuleBasedStateMachine):
    """Streams are FIFO both ways; between streams there is no order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.random = random.Random(5)
        self.source = bytearray(self.random.randbytes(1 << 16))
        self.pages = bytearray(1 << 16)
        self.sending, self.receiving = Sending(1 << 30), Receiving(100)
        self.sending.hedge_after_s = 2.0
        self.transfers: dict[int, Transferring] = {}
        self.leases: dict[int, Lease] = {}
        self.frozen: dict[int, bytes] = {}
        self.received: set[int] = set()
        self.boot, self.names, self.serial = b"a", {}, 0
        self.out: dict[int, deque[bytes]] = {}
        self.back: dict[int, deque[bytes]] = {}
        for slot in range(K_STREAMS):
            self.connect(slot)

    def connect(self, slot: int) -> None:
        self.serial += 1
        self.names[slot] = self.serial
        self.out[slot], self.back[slot] = deque(), deque()

    # Owners

    @initialize()
    def first(self) -> None:
        self.grant()

    @precondition(lambda self: len(self.leases) < 12)
    @rule()
    def grant(self) -> None:
        lease_id = len(self.leases) + 1
        at = K_BASE + (lease_id - 1) * K_LEASE_BYTES
        lease = Lease(
            lease_id,
            bytes([lease_id]) * 16,
            lease_id,
            7,
            Ranges([(at, K_LEASE_BYTES)]),
            self.now + 1000.0,
            "owner",
        )
        self.leases[lease_id] = lease
        self.receiving.grant(lease, Ranges([(K_BASE, 1 << 16)]))

    @precondition(lambda self: len(self.transfers) < 12)
    @rule(
        data=st.data(), n=st.integers(1, 6), size=st.integers(1, 680), deadline=st.sampled_from([5.0, 900.0])
    )
    def submit(self, data, n, size, deadline) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.leases)))
        transfer_id = len(self.transfers) + 1
        at = (lease_id - 1) * K_LEASE_BYTES
        places = self.random.sample(range(K_LEASE_BYTES // 682), n)
        offsets = [p * 682 for p in places]
        plan: Blocks
        if data.draw(st.booleans(), "a slice of each token"):
            step, count = size % 50 + 1, 20 + size % 20
            row = [at + step, K_BASE + at + step, 2 * step, 2 * step, step, count]
            runs = StridedSegments(np.array([row], dtype=np.uint64))
            plan, columns = StridedPlan(runs, K_BLOCK), runs.columns()
        else:
            here = np.array(offsets) + at
            columns = here, here + K_BASE, np.full(n, size)
            plan = Plan(*columns, K_BLOCK)
        segments = [tuple(map(int, row)) for row in zip(*columns, strict=True)]
        opening = f.Open(
            lease_id,
            7,
            lease_id,
            bytes([lease_id]) * 16,
            "kv",
            plan.total_bytes,
            plan.n_blocks,
            0.0,
            transfer_id,
        )
        self.transfers[transfer_id] = Transferring(
            transfer_id, lease_id, plan, segments, opening, self.now + deadline
        )
        self.sending.submit(transfer_id, opening, plan, K_WINDOW, self.now + deadline, self.now)

    @precondition(lambda self: any(x not in self.frozen for x in self.leases))
    @rule(data=st.data())
    def revoke(self, data) -> None:
        lease_id = data.draw(st.sampled_from([x for x in sorted(self.leases) if x not in self.frozen]))
        self.receiver_says(self.receiving.end(lease_id, FailureReason.CANCELLED))
        self.frozen[lease_id] = self.lease_bytes(lease_id)

    @precondition(lambda self: self.transfers)
    @rule(data=st.data())
    def cancel(self, data) -> None:
        key = data.draw(st.sampled_from(sorted(self.transfers)))
        self.ended(self.sending.fail(key, FailureReason.CANCELLED))

    @rule(seconds=st.floats(0.1, 3))
    def wait(self, seconds) -> None:
        self.now += seconds
        for event in self.sending.tick(self.now):
            self.ended(event)
        self.receiver_says(self.receiving.tick(self.now))

    # The wire

    @rule(slot=st.integers(0, K_STREAMS - 1), corrupt=st.sampled_from([False] * 7 + [True]))
    def send(self, slot, corrupt) -> None:
        draw = self.sending.draw(self.names[slot], self.now)
        if draw is None:
            return
        if draw.open_first:
            opening = self.sending.opening(draw.transfer_id, self.now)
            self.out[slot].append(f.message_frame(K_VERSION, f.FrameType.OPEN, opening, draw.transfer_id))
        piece = self.sending.plan(draw.transfer_id).block(draw.block_id)
        payload = b"".join(bytes(self.source[int(a) : int(a) + int(n)]) for a, n in each(piece.source))
        table = encode_table(piece.destination, K_VERSION)
        body = table + payload
        header = f.Header(
            K_VERSION,
            f.FrameType.BLOCK,
            0,
            len(body),
            len(table),
            draw.transfer_id,
            draw.block_id,
            f.checksum(body),
        )
        if corrupt:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.out[slot].append(header.to_bytes() + body)

    @rule(slot=st.integers(0, K_STREAMS - 1), n=st.integers(1, 4))
    def deliver(self, slot, n) -> None:
        for _ in range(min(n, len(self.out[slot]))):
            self.arrive(slot, self.out[slot].popleft())

    @rule(slot=st.integers(0, K_STREAMS - 1), n=st.integers(1, 4))
    def answer(self, slot, n) -> None:
        for _ in range(min(n, len(self.back[slot]))):
            frame = self.back[slot].popleft()
            header, body = (
                f.Header.from_bytes(frame[: f.K_HEADER_BYTES], K_VERSION),
                frame[f.K_HEADER_BYTES :],
            )
            if header.type is f.FrameType.ACK:
                for transfer_id, block_id in f.decode_acks(body):
                    self.ended(self.sending.on_ack(transfer_id, block_id))
            elif header.type is f.FrameType.NACK:
                self.ended(self.sending.on_nack(header.transfer_id, header.block_id))
            else:
                why = f.decode_message(body, f.Refuse)
                self.ended(self.sending.on_refuse(header.transfer_id, FailureReason(why.reason), why.detail))

    @rule(slot=st.integers(0, K_STREAMS - 1), delivered=st.integers(0, 3), heard=st.booleans())
    def cut(self, slot, delivered, heard) -> None:
        """The stream dies; the receiver still reads some of what was under way, and its answers are lost, or
        come by another stream.
        """
        late, name = self.out[slot], self.names[slot]
        self.connect(slot)
        self.sending.on_stream_lost(name)
        for frame in list(late)[:delivered]:
            self.arrive(slot if heard else None, frame)

    @rule()
    def receiver_restarts(self) -> None:
        """Another pump takes over: the owner tells it of the leases that live; answers under way are lost."""
        self.receiving = Receiving(100)
        for lease_id, lease in self.leases.items():
            if lease_id not in self.frozen:
                lease.transfers.clear()
                self.receiving.grant(lease, Ranges([(K_BASE, 1 << 16)]))
        for slot in range(K_STREAMS):
            self.sending.on_stream_lost(self.names[slot])
            self.connect(slot)
        self.sending.on_peer_restarted()

    def arrive(self, slot: int | None, frame: bytes) -> None:
        header, body = f.Header.from_bytes(frame[: f.K_HEADER_BYTES], K_VERSION), frame[f.K_HEADER_BYTES :]
        back = self.back[slot] if slot is not None else deque()
        if header.type is f.FrameType.OPEN:
            opening = f.decode_message(body, f.Open)
            refused = self.receiving.on_open("peer", "east", header.transfer_id, opening, self.now)
            if refused is not None:
                self.refuse(back, header.transfer_id, refused.reason)
            return
        if f.checksum(body) != header.body_crc:
            back.append(
                f.control_frame(K_VERSION, f.FrameType.NACK, b"", header.transfer_id, header.block_id)
            )
            return
        pieces = decode_table(body[: header.table_bytes], K_VERSION, header.body_bytes - header.table_bytes)
        answer = self.receiving.on_block("peer", header.transfer_id, header.block_id, pieces)
        if isinstance(answer, Apply):
            at = header.table_bytes
            for address, length in each(pieces):
                self.pages[address - K_BASE : address - K_BASE + length] = body[at : at + length]
                at += length
            event = self.receiving.applied(answer.incoming, header.block_id, len(body) - header.table_bytes)
            self.receiver_says([event] if event is not None else [])
        if isinstance(answer, Apply | Known):
            back.append(
                f.control_frame(
                    K_VERSION, f.FrameType.ACK, f.ack_body([(header.transfer_id, header.block_id)])
                )
            )
        else:
            self.refuse(back, header.transfer_id, answer.reason)

    def refuse(self, back: deque[bytes], transfer_id: int, reason: FailureReason) -> None:
        back.append(f.message_frame(K_VERSION, f.FrameType.REFUSE, f.Refuse(reason.value), transfer_id))

    def receiver_says(self, events) -> None:
        for event in events:
            if isinstance(event, Received):
                self.received.add(event.incoming.transfer_id)
                assert self.landed(self.transfers[event.incoming.transfer_id])
            assert isinstance(event, Received | Broken)

    def ended(self, event) -> None:
        if event is None:
            return
        transfer = self.transfers[event.transfer_id]
        transfer.ended.append(event)
        assert len(transfer.ended) == 1, "a transfer ended twice"
        if isinstance(event, Completed):
            assert event.payload_bytes == transfer.plan.total_bytes
            assert event.transfer_id in self.received, "success before the receiver's word"

    def landed(self, transfer: Transferring) -> bool:
        return all(
            self.pages[d - K_BASE : d - K_BASE + n] == self.source[s : s + n] for s, d, n in transfer.segments
        )

    def lease_bytes(self, lease_id: int) -> bytes:
        return bytes(self.pages[(lease_id - 1) * K_LEASE_BYTES : lease_id * K_LEASE_BYTES])

    @invariant()
    def nothing_is_written_after_a_lease_has_ended(self) -> None:
        for lease_id, canary in self.frozen.items():
            assert self.lease_bytes(lease_id) == canary

    @invariant()
    def no_more_than_the_window_is_in_flight(self) -> None:
        for lease_id in self.leases:
            assert 0 <= self.sending.in_flight_of(lease_id) <= K_WINDOW

    @invariant()
    def backlog_is_what_is_neither_in_flight_nor_acknowledged(self) -> None:
        left = sum(t.plan.total_bytes for t in self.transfers.values() if not t.ended)
        known = self.sending.backlog_bytes + self.sending.in_flight_bytes + self.sending.acked_bytes
        assert known == left

    def teardown(self) -> None:
        """The faults stop: all that can complete does, and what was refused says why."""
        for _ in range(400):
            if all(t.ended for t in self.transfers.values()):
                break
            for slot in range(K_STREAMS):
                self.send(slot, False)
                self.deliver(slot, 10)
                self.answer(slot, 10)
        for transfer in self.transfers.values():
            assert len(transfer.ended) == 1
            event = transfer.ended[0]
            if isinstance(event, Failed):
                assert event.reason in (
                    FailureReason.DEADLINE, FailureReason.CANCELLED, FailureReason.LEASE_ENDED,
                    FailureReason.LEASE_UNKNOWN,
                )  # fmt: skip
                assert event.reason is not FailureReason.LEASE_UNKNOWN or transfer.lease_id in self.frozen
        assert self.sending.in_flight_bytes == self.sending.backlog_bytes == 0
        self.nothing_is_written_after_a_lease_has_ended()


TestWire = Wire.TestCase
TestWire.settings = settings(max_examples=70, stateful_step_count=50, deadline=None)
