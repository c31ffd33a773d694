"""What a server submits, as a plan of blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from prfaas.model.errors import PrfaasError
from prfaas.pump_client import messages as m
from prfaas.transfer.plans import Blocks, Plan, StridedPlan
from prfaas.transfer.segments import U64, Ranges
from prfaas.transfer.strides import StridedSegments, holds
from prfaas.transfer.tables import K_STRIDES_VERSION


class NotRegistered(PrfaasError):
    """A source that isn't the server's registered memory."""

    def __init__(self) -> None:
        super().__init__("a source that isn't registered")


def u64(data: bytes) -> U64:
    return np.frombuffer(data, dtype="<u8").astype(np.uint64, copy=False)


def planned(message: m.Submit, registered: Ranges) -> Callable[[int, int], Blocks]:
    """What makes the message's plan from a block size and the peer's protocol version.

    Raises NotRegistered; PrfaasError, ValueError for what are no segments.
    """
    if not message.strides:
        src, dst, length = u64(message.sources), u64(message.destinations), u64(message.lengths)
        if not src.shape == dst.shape == length.shape:
            raise PrfaasError("arrays of different lengths")
        if not registered.holds_columns(src, length):
            raise NotRegistered
        return lambda block_bytes, _: Plan(src, dst, length, block_bytes)
    segments = StridedSegments.from_bytes(message.strides)
    if not holds(registered, segments.source):
        raise NotRegistered

    def plan(block_bytes: int, version: int) -> Blocks:
        if version < K_STRIDES_VERSION:
            return Plan(*segments.columns(), block_bytes)
        return StridedPlan(segments, block_bytes)

    return plan
