"""How much may be sent twice on suspicion.

A second copy of a block that is late (sending.py) helps where one stream lost a packet, and harms where the
whole link is slow: then every block is late, and copies make it slower. So copies are paid for: each byte
sent otherwise earns K_SHARE of a byte, and no more than K_BURST_BYTES are ever saved up. Over any stretch of
time copies are at most K_BURST_BYTES + K_SHARE of what is sent otherwise in it, and one block: on a congested
link they cost in the long run no more than K_SHARE / (1 + K_SHARE) of its rate. What is sent again because
its stream was lost or it arrived corrupt isn't suspicion: it counts as sent otherwise.
"""

from __future__ import annotations

K_SHARE = 0.05
K_BURST_BYTES = 2 << 20


class HedgeBudget:
    """Bytes that may be sent twice now."""

    def __init__(self) -> None:
        self._bytes = float(K_BURST_BYTES)
        self.copied_bytes = 0

    @property
    def open(self) -> bool:
        """Whether a block may be copied. It may be larger than what is left: then the next waits longer."""
        return self._bytes > 0

    def sent(self, sent_bytes: int) -> None:
        """So much was sent, and not on suspicion."""
        self._bytes = min(float(K_BURST_BYTES), self._bytes + K_SHARE * sent_bytes)

    def copied(self, block_bytes: int) -> None:
        """A block was sent once more on suspicion."""
        self._bytes -= block_bytes
        self.copied_bytes += block_bytes
