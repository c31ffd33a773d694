"""Types of a transfer between sites: its kinds, its outcome, the grant that a decode side hands to a prefill
side.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from enum import StrEnum


class TransferKind(StrEnum):
    """What a transfer carries; kinds of one request never wait for one another."""

    KV = "kv"
    STATE = "state"
    AUX = "aux"
    RAW = "raw"


class FailureReason(StrEnum):
    """Why a transfer ended without success, or why a peer refused it. Counted by this name."""

    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    PEER_UNREACHABLE = "peer_unreachable"
    PEER_UNTRUSTED = "peer_untrusted"
    LEASE_UNKNOWN = "lease_unknown"
    LEASE_ENDED = "lease_ended"
    LEASE_MISMATCH = "lease_mismatch"
    ADDRESS_REFUSED = "address_refused"
    SOURCE_REFUSED = "source_refused"
    SOURCE_GONE = "source_gone"
    OWNER_GONE = "owner_gone"
    TOO_MANY = "too_many"
    BAD_REQUEST = "bad_request"
    CORRUPT = "corrupt"
    LEDGER = "ledger"
    PUMP_LOST = "pump_lost"
    VERSION = "version"


@dataclass(frozen=True)
class Outcome:
    """How a transfer ended. `ok` is the receiver's word: every block checked, applied and acknowledged."""

    ok: bool
    reason: FailureReason | None = None
    detail: str = ""
    payload_bytes: int = 0
    resent_blocks: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class LeaseGrant:
    """What the decode side sends to the prefill side: where to write, and the right to.

    `token` is random and secret: whoever shows it, from the right site, may write to the lease until it ends.
    `window_bytes` may be in flight at once before the receiver has said anything more.
    """

    address: str
    """host:port of the receiving pump, as the sender dials it."""
    lease_id: int
    token: bytes
    room: int
    generation: int
    window_bytes: int
    site: str = ""
    """The site whose certificate the receiving pump must show; empty: any the configuration trusts."""

    def to_text(self) -> str:
        """One line of JSON, for a bootstrap message."""
        fields = asdict(self)
        fields["token"] = base64.b64encode(self.token).decode()
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str | bytes) -> LeaseGrant:
        """Inverse of to_text. Raises ValueError for anything else."""
        try:
            fields = json.loads(text)
            fields["token"] = base64.b64decode(fields["token"], validate=True)
            grant = cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a lease grant: {error}") from None
        numbers = (grant.lease_id, grant.room, grant.generation, grant.window_bytes)
        texts = (grant.address, grant.site)
        if not all(type(x) is int and x >= 0 for x in numbers) or not all(isinstance(x, str) for x in texts):
            raise ValueError("not a lease grant: a field has the wrong type")
        return grant
