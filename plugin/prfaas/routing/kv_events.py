"""SGLang's KV event messages: bytes in, events out, in order. No socket, no clock; garbage is counted.

A message is (sequence, payload); the payload is msgpack [timestamp, [event …], data-parallel rank], events
being maps whose `type` names their class. Sequences of one server rise by one; `EventFeed` notices a gap,
keeps what comes after it, says from where a replay is needed, and goes on once the gap is filled. A
sequence that starts over means that the server did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

K_PENDING_LIMIT = 4096  # messages kept behind a gap; beyond, the gap counts as lost for good
K_GPU = (None, "GPU")  # media whose blocks can be used at once


class BlockStored(msgspec.Struct, tag=True, frozen=True, gc=False):
    """Blocks now in the cache, in chain order."""

    block_hashes: list[int]
    block_size: int
    parent_block_hash: int | None = None
    medium: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, frozen=True, gc=False):
    """Blocks no longer in the cache."""

    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, frozen=True, gc=False):
    """Nothing is in the cache: start, flush, or change of role."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class _Batch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


class _LooseBatch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[msgspec.Raw]


_decoder = msgspec.msgpack.Decoder(_Batch)
_loose = msgspec.msgpack.Decoder(_LooseBatch)
_one = msgspec.msgpack.Decoder(BlockStored | BlockRemoved | AllBlocksCleared)
_kind = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])


def decode_batch(payload: bytes) -> list[KvEvent]:
    """The events of one message; kinds this version doesn't know are left out.

    Raises ValueError for garbage.
    """
    try:
        return list(_decoder.decode(payload).events)
    except msgspec.ValidationError:
        return _decode_known(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"not a KV event message: {error}") from None


def _decode_known(payload: bytes) -> list[KvEvent]:
    known = {"BlockStored", "BlockRemoved", "AllBlocksCleared"}
    events: list[KvEvent] = []
    try:
        for raw in _loose.decode(payload).events:
            tag = _kind.decode(raw).get("type")
            if tag is None:
                raise ValueError("an event has no type")
            if msgspec.msgpack.decode(tag) in known:
                events.append(_one.decode(raw))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"not a KV event message: {error}") from None
    return events


@dataclass(frozen=True, slots=True)
class Received:
    """What one message led to."""

    events: Sequence[KvEvent] = ()
    """To be applied, in order."""
    replay_from: int | None = None
    """Messages from this sequence on are missing: ask for a replay."""
    reset: bool = False
    """Forget all that was known of this server, before applying `events`."""
    garbage: int = 0
    """Messages that weren't understood."""


class EventFeed:
    """Messages of one server, live and replayed, into order. Duplicates are dropped."""

    def __init__(self) -> None:
        self.next_sequence: int | None = None
        self._pending: dict[int, bytes] = {}

    def on_message(self, sequence: int, payload: bytes) -> Received:
        """A live message."""
        if self.next_sequence is None:
            # Joined in the middle: what came before is wanted too.
            self.next_sequence = 0
        if sequence < self.next_sequence and sequence == 0:
            self.next_sequence, self._pending = 0, {}
            return self._drain({0: payload}, reset=True)
        if sequence < self.next_sequence or sequence in self._pending:
            return Received()
        if sequence > self.next_sequence:
            if len(self._pending) >= K_PENDING_LIMIT:
                return self.on_replay_failed()
            self._pending[sequence] = payload
            return Received(replay_from=self.next_sequence if len(self._pending) == 1 else None)
        return self._drain({sequence: payload})

    def on_replayed(self, sequence: int, payload: bytes) -> Received:
        """A message of a replay; older ones than needed are dropped."""
        if self.next_sequence is None:
            self.next_sequence = 0
        if sequence < self.next_sequence:
            return Received()
        self._pending.setdefault(sequence, payload)
        return self._drain({})

    def on_replay_failed(self) -> Received:
        """The missing messages can't be had: forget the server, go on with what came after the gap."""
        if not self._pending:
            return Received()
        self.next_sequence = min(self._pending)
        return self._drain({}, reset=True)

    def _drain(self, first: dict[int, bytes], reset: bool = False) -> Received:
        events: list[KvEvent] = []
        garbage = 0
        self._pending.update(first)
        assert self.next_sequence is not None
        while (payload := self._pending.pop(self.next_sequence, None)) is not None:
            self.next_sequence += 1
            try:
                events += decode_batch(payload)
            except ValueError:
                # What it said is lost, so what the server holds isn't known any more.
                garbage += 1
                events, reset = [], True
        return Received(events=events, reset=reset, garbage=garbage)
