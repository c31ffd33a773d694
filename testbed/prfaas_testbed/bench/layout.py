"""Where the segments of a transfer lie in the two pools. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

from prfaas_testbed.bench.cell import Cell

K_MOST_POOL_BYTES = 512 << 20  # a repetition that moves more goes over the same pool again
K_MOST_LINK_POOL_BYTES = 1 << 30  # over a link it should not: what landed is counted in the pages
K_SPARE_S = 0.5


@dataclass(frozen=True)
class Layout:
    """Segments of one size, contiguous or scattered, at the same offsets at both ends."""

    segment_bytes: int
    segments: int
    contiguous: bool

    @classmethod
    def of(cls, cell: Cell) -> Layout:
        wanted, most_bytes = cell.segments, K_MOST_POOL_BYTES
        if cell.rate_mbps is not None:
            lasts_s = cell.warm_s + cell.steady_s() + K_SPARE_S
            wanted = max(wanted, int(cell.rate_mbps * 1e6 / 8 * lasts_s) // cell.segment_bytes)
            most_bytes = K_MOST_LINK_POOL_BYTES
        most = max(1, most_bytes // cell.segment_bytes // (1 if cell.contiguous else 2))
        segments = cell.segments if cell.one_call else min(wanted, most)
        return cls(cell.segment_bytes, segments, cell.contiguous)

    @property
    def total_bytes(self) -> int:
        """What fills every place once."""
        return self.segments * self.segment_bytes

    @property
    def pool_bytes(self) -> int:
        return self.segment_bytes * self.segments * (1 if self.contiguous else 2)

    @cached_property
    def offsets(self) -> list[int]:
        """Scattered: every second place, in a shuffled order (the same every time), as a page table's would
        be.
        """
        if self.contiguous:
            return [index * self.segment_bytes for index in range(self.segments)]
        places = [2 * index * self.segment_bytes for index in range(self.segments)]
        random.Random(7).shuffle(places)
        return places

    def segments_in(self, seconds: float, rate_mbps: float | None) -> int:
        """How many the link carries in that time; all of them where it has no set rate."""
        if rate_mbps is None:
            return self.segments
        return max(1, min(self.segments, int(rate_mbps * 1e6 / 8 * seconds / self.segment_bytes)))
