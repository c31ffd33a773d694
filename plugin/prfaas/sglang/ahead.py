"""What of a request's KV leaves before SGLang hands its chunk over: layer by layer.

SGLang hands a chunk over when all of its layers are computed. Each layer's part of it is final earlier: when
the layer has written the chunk's tokens. Here is what is remembered meanwhile, by room: which pages, at which
positions among the room's, are planned for which peer, and which of their segments have been sent. When the
chunk comes it is sent less those; whatever doesn't fit (other pages than were foreseen, another lease) is
sent whole, so nothing depends on foresight being right but the time it takes.

No SGLang here, and no sending. A room's items come to one worker's queue in order, and its pieces are that
worker's alone; only `forget` may be called from elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prfaas.sglang.planning import U64, Segments, joined

K_LEAST_BYTES = 1 << 16
"""Layers are gathered until there is so much: below it a transfer's own cost would show."""


@dataclass(frozen=True)
class Written:
    """Buffers that a forward pass has filled for all its tokens, from `event` on (None: now)."""

    buffers: tuple[int, ...]
    event: Any = None


@dataclass
class RoomAhead:
    """A room's part of a forward pass: pages that all its layers will have filled when it is through."""

    room: int
    first: int
    """Position of the first page among the room's."""
    pages: Any
    """On the GPU's way to host memory until `event`."""
    event: Any = None


@dataclass
class Forward:
    """One forward pass, as far as one worker's rooms are in it. The scheduler's thread appends to `written`
    and puts the pass on the worker's queue; the worker reads."""

    rooms: list[RoomAhead] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    seen: int = 0
    """How much of `written` the worker has dealt with."""


class Piece:
    """Pages at consecutive positions of a room, mapped to one peer's."""

    def __init__(
        self, session: str, grant: Any, first: int, pages: NDArray[Any], segments: Segments, buffers: U64
    ) -> None:
        """`buffers`: which KV buffer each segment is of."""
        self.session, self.grant, self.first, self.pages = session, grant, first, pages
        self._segments, self._buffers = segments, buffers
        self._ready = np.zeros(len(segments), dtype=bool)
        self._sent = np.zeros(len(segments), dtype=bool)
        self.begun = False
        """Whether anything of it may have been sent, be it in part."""
        self.given_up = False
        """What hasn't been sent goes with its chunk."""

    @property
    def end(self) -> int:
        return self.first + len(self.pages)

    def note(self, buffers: Sequence[int]) -> None:
        """These buffers hold all of the piece's tokens."""
        self._ready |= np.isin(self._buffers, buffers)

    def ready(self) -> tuple[Segments, NDArray[np.bool_]] | None:
        """What can be sent and hasn't been, if it is worth it; with what `sent` is to be told."""
        rows = self._ready & ~self._sent
        if self.given_up or int(self._segments.length[rows].sum()) < K_LEAST_BYTES:
            return None
        return self._segments.some(rows), rows

    def sent(self, rows: NDArray[np.bool_]) -> int:
        """Note it; how many bytes that is."""
        self._sent |= rows
        return int(self._segments.length[rows].sum())

    def rest(self) -> Segments:
        """What hasn't been sent."""
        return self._segments.some(~self._sent)


class Ahead:
    """All rooms' pieces."""

    def __init__(self, pointers: Sequence[int]) -> None:
        """`pointers`: to the KV buffers, in SGLang's order."""
        starts = np.asarray(pointers, dtype=np.uint64)
        self._order = np.argsort(starts, kind="stable")
        self._starts = starts[self._order]
        self._lock = threading.Lock()
        self._pieces: dict[int, list[Piece]] = {}
        self._sent_bytes: dict[int, int] = {}

    def buffers_of(self, addresses: U64) -> U64:
        """The buffer that each address lies in."""
        at = np.searchsorted(self._starts, addresses, side="right") - 1
        return self._order[at].astype(np.uint64)

    def add(self, room: int, piece: Piece) -> None:
        with self._lock:
            self._pieces.setdefault(room, []).append(piece)

    def pieces(self, room: int) -> list[Piece]:
        with self._lock:
            return list(self._pieces.get(room, ()))

    def sent(self, room: int, piece: Piece, rows: NDArray[np.bool_]) -> None:
        """These of a piece's segments are on their way. Of one that was forgotten meanwhile nothing stays."""
        with self._lock:
            if piece in self._pieces.get(room, ()):
                self._sent_bytes[room] = self._sent_bytes.get(room, 0) + piece.sent(rows)

    def sent_bytes(self, room: int) -> int:
        """What of a room has left before its chunks."""
        return self._sent_bytes.get(room, 0)

    def give_up(self, room: int) -> None:
        """Nothing more of its pieces leaves before their chunk. They are kept: what of them is on its way
        must be known when the chunk comes (see `rest`).
        """
        for piece in self.pieces(room):
            piece.given_up = True

    def forget(self, room: int) -> None:
        """Unknown rooms are ignored."""
        with self._lock:
            self._pieces.pop(room, None)
            self._sent_bytes.pop(room, None)

    def rest(
        self,
        room: int,
        session: str,
        grant: Any,
        first: int,
        pages: NDArray[Any],
        plan: Callable[[int, int], Segments],
    ) -> tuple[Segments, bool]:
        """What is left to send of a chunk's pages, at positions from `first` on, and whether it goes where
        something that was sent before it goes too. `plan(i, j)` maps pages i to j of them. Pieces that begin
        before the chunk's end are done with."""
        mine = self._take(room, session, first + len(pages))
        parts: list[Segments] = []
        at, again = 0, False
        for piece in sorted(mine, key=lambda piece: piece.first):
            begin, end = piece.first - first, piece.end - first
            fits = at <= begin and end <= len(pages) and piece.grant is grant
            if not fits or not np.array_equal(pages[begin:end], piece.pages):
                again = again or piece.begun
                continue
            if begin > at:
                parts.append(plan(at, begin))
            parts.append(piece.rest())
            at = end
        if at < len(pages):
            parts.append(plan(at, len(pages)))
        return joined(parts), again

    def _take(self, room: int, session: str, before: int) -> list[Piece]:
        """Its pieces for a peer that begin before a position; they are known no more."""
        with self._lock:
            pieces = self._pieces.pop(room, [])
            mine = [piece for piece in pieces if piece.session == session and piece.first < before]
            if others := [piece for piece in pieces if piece not in mine]:
                self._pieces[room] = others
        return mine

    def __len__(self) -> int:
        """How many rooms something is remembered of."""
        return len(self._pieces.keys() | self._sent_bytes.keys())
