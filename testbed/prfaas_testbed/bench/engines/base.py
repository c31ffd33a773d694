"""What the bench asks of an engine, and what it gets back."""

from __future__ import annotations

import abc
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from prfaas_testbed.bench.cell import Cell
from prfaas_testbed.bench.places import Place


@dataclass
class Sample:
    """One repetition, raw."""

    goodput_mbps: float
    """Payload that the receiver has, 10^6 bit/s: over a link while there was always more to send (steady.py),
    else from the first call to the last byte.
    """
    bytes: int
    seconds: float
    """Of the whole repetition; iperf3's are those of its span."""
    cpu_s: float | None = None
    """Processor seconds of both ends together, while the bytes moved."""
    retransmits: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Further raw values: latency of calls, stages, the streams and congestion control in use."""

    def columns(self) -> dict[str, Any]:
        values = asdict(self)
        values.update(values.pop("extra"))
        return values


class Engine(abc.ABC):
    """One way to move bytes, set up between the two ends of a place for one cell.

    Use it as a context: its processes end with it.
    """

    name: str
    streams: int | None
    """How many connections it was told to use; None where it chooses, or has its own way."""

    def spawn(self, place: Place, cell: Cell) -> None:
        """Start what takes a while to come up, and return at once; `start` does it where nobody has.

        Raises MachineError when this machine lacks what it needs.
        """
        return None

    @abc.abstractmethod
    def start(self, place: Place, cell: Cell) -> None:
        """Start its processes and move a little, so that no repetition pays for cold connections.

        Raises MachineError when this machine lacks what it needs.
        """

    @abc.abstractmethod
    def measure(self, limit_s: float) -> Sample:
        """Move the cell's bytes, or as many as go in about `limit_s`. Raises WorkerError."""

    @abc.abstractmethod
    def close(self) -> None:
        """End what was started. Harmless when nothing was."""

    def describe(self) -> dict[str, Any]:
        """What a result says of it: version and settings."""
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
