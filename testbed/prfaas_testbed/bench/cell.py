"""What one measurement is of: a link's parameters and the transfer over it. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from prfaas.model.errors import UsageError

K_STREAMS_IPERF3 = (1, 4, 8, 16, 32)
K_PAYLOAD_BYTES, K_FRAME_BYTES = 1448, 1514
K_WARM_S, K_WARM_RTTS = 1.0, 20
"""Left out of what is measured over a link: slow start to the matrix's largest window takes half of it."""
K_STEADY_LEAST_S, K_LOOPBACK_S = 2.0, 5.0
K_BBR_CYCLE_S = 10.0
"""BBR sends next to nothing for 0.2 s and a round trip in every so many. A single span that is shorter holds
that or doesn't by chance, and one right after the connections were opened never does.
"""
K_MOST_LOSS = 0.3  # beyond this TCP hardly moves, and no measurement ends in time
K_LOSS_FORM = re.compile(r"(?P<value>\d+(\.\d+)?([eE]-?\d+)?)(?P<percent>%?)(:burst=(?P<burst>\d+(\.\d+)?))?")


@dataclass(frozen=True)
class Loss:
    """Packet loss of one direction: independent, or in bursts (Gilbert-Elliott; the bad state loses all)."""

    fraction: float
    """Long-run share of packets lost, 0 to 1."""
    burst_packets: float = 1.0
    """Mean length of a run of losses; 1 means independent."""

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= K_MOST_LOSS:
            raise UsageError(f"loss: found {self.fraction:g}; 0 to {K_MOST_LOSS:.0%} are allowed")
        if not 1 <= self.burst_packets <= 1000:
            raise UsageError(f"loss: found bursts of {self.burst_packets:g} packets; 1 to 1000 are allowed")

    @classmethod
    def parse(cls, text: str) -> Loss:
        """`0.5%`, `0.005` (a fraction), either with `:burst=PACKETS`. Raises UsageError."""
        found = K_LOSS_FORM.fullmatch(text.strip())
        if not found:
            raise UsageError(f"loss: found {text!r}; allowed are forms as 0.5%, 0.005 and 1%:burst=8")
        value = float(found["value"]) / (100 if found["percent"] else 1)
        return cls(value, float(found["burst"] or 1))

    @property
    def bursty(self) -> bool:
        return self.fraction > 0 and self.burst_packets > 1

    def __str__(self) -> str:
        return f"{self.fraction * 100:g}%" + (f":burst={self.burst_packets:g}" if self.bursty else "")


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix. Without `rtt_ms` and `rate_mbps` the two ends share a host, over loopback."""

    rtt_ms: float | None = None
    rate_mbps: float | None = None
    loss: Loss = Loss(0.0)
    congestion_control: str = "cubic"
    """The only one that engines may use besides what the kernel's default is set to: `bbr` allows cubic too.
    """
    segment_bytes: int = 65536
    total_bytes: int = 150_000_000
    """Least that a repetition moves, unless it runs into its time limit."""
    contiguous: bool = False
    """Segments follow each other in memory (else every second place of a pool twice as large)."""
    tls: bool = False
    one_call: bool = False
    """prfaas gets all segments in one call, not a few batches under way."""
    streams: int | None = None
    """Of iperf3 and prfaas; None: iperf3 at each of 1, 4, 8, 16, 32, and prfaas chooses."""
    name: str = ""

    def __post_init__(self) -> None:
        _within("rtt-ms", self.rtt_ms, 0, 2000)
        _within("rate-mbps", self.rate_mbps, 1, 100_000)
        _within("segment-bytes", self.segment_bytes, 512, 1 << 30)
        _within("total-bytes", self.total_bytes, 1, 1 << 40)
        _within("streams", self.streams, 1, 128)
        if self.congestion_control not in ("cubic", "bbr", "reno"):
            raise UsageError(
                f"congestion-control: found {self.congestion_control!r}; cubic, bbr and reno are allowed"
            )
        if self.segment_bytes > self.total_bytes:
            raise UsageError(
                f"segment-bytes: found {self.segment_bytes}, more than total-bytes ({self.total_bytes})"
            )

    @property
    def emulated(self) -> bool:
        return self.rtt_ms is not None

    @property
    def rtt_s(self) -> float:
        return (self.rtt_ms or 0.0) / 1e3

    @property
    def segments(self) -> int:
        """How many segments `total_bytes` fill, rounded up."""
        return -(-self.total_bytes // self.segment_bytes)

    @property
    def ceiling_mbps(self) -> float | None:
        """The most payload that TCP carries over the link: full frames at an MTU of 1500, with timestamps."""
        return None if self.rate_mbps is None else self.rate_mbps * K_PAYLOAD_BYTES / K_FRAME_BYTES

    @property
    def warm_s(self) -> float:
        """Whole seconds, as iperf3 takes them."""
        return max(K_WARM_S, float(round(K_WARM_RTTS * self.rtt_s)))

    def steady_s(self, limit_s: float = float("inf")) -> float:
        """What is measured after them: as long as the cell's bytes take at the link's rate, within bounds."""
        if self.rate_mbps is None:
            return min(K_LOOPBACK_S, limit_s)
        bytes_own_s = self.total_bytes * 8 / (self.rate_mbps * 1e6)
        return float(round(max(K_STEADY_LEAST_S, min(bytes_own_s, limit_s))))

    def parameters(self) -> dict[str, object]:
        """The cell as the columns of its rows."""
        return {
            "cell": self.name or self.label(),
            "rtt_ms": self.rtt_ms,
            "rate_mbps": self.rate_mbps,
            "ceiling_mbps": self.ceiling_mbps,
            "loss": self.loss.fraction,
            "burst_packets": self.loss.burst_packets,
            "congestion_control": self.congestion_control,
            "segment_bytes": self.segment_bytes,
            "total_bytes": self.total_bytes,
            "contiguous": self.contiguous,
            "tls": self.tls,
        }

    def label(self) -> str:
        if not self.emulated:
            return f"loopback-{self.segment_bytes // 1024}k" + ("-tls" if self.tls else "")
        loss = str(self.loss).replace(":burst=", "b")
        return f"{self.rtt_ms:g}ms-{self.rate_mbps:g}mbit-{loss}-{self.congestion_control}"

    def with_(self, **changes: object) -> Cell:
        return replace(self, **changes)  # type: ignore[arg-type]


def _within(what: str, value: float | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise UsageError(f"{what}: found {value}; {least} to {most} are allowed")


def _wan(
    name: str, rtt_ms: float, rate_mbps: float, loss: str, congestion_control: str, least_s: float = 6.0
) -> Cell:
    # Six seconds of the link at its full rate, twelve on the farthest: long against slow start and the ways
    # there and back, short enough for many repetitions.
    return Cell(
        rtt_ms=rtt_ms,
        rate_mbps=rate_mbps,
        loss=Loss.parse(loss),
        congestion_control=congestion_control,
        total_bytes=int(rate_mbps * 1e6 / 8 * max(least_s, 0.08 * rtt_ms)),
        name=name,
    )


NAMED_CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        _wan("metro-clean", 20, 200, "0", "cubic"),
        _wan("wan-clean", 40, 200, "0", "cubic"),
        _wan("wan-thin-loss", 40, 200, "0.1%", "cubic"),
        _wan("wan-loss", 40, 200, "1%", "cubic"),
        _wan("wan-loss-bbr", 40, 200, "1%", "bbr"),
        _wan("wan-burst", 40, 200, "1%:burst=8", "cubic"),
        _wan("continent-thin-loss", 80, 100, "0.1%", "cubic"),
        _wan("ocean-loss-bbr", 150, 100, "1%", "bbr"),
    )
}
"""The eight that get every repetition, each for one reason that a link can be hard."""


def full_matrix() -> list[Cell]:
    """Every cell: RTT x loss x rate x congestion control. Each is measured once, with BBR over a cycle."""
    least_s = {"bbr": K_BBR_CYCLE_S}
    return [
        _wan("", rtt, rate, loss, congestion_control, least_s.get(congestion_control, 6.0))
        for rate in (100, 200)
        for rtt in (20, 40, 80, 150)
        for loss in ("0", "0.1%", "1%", "1%:burst=8")
        for congestion_control in ("cubic", "bbr")
    ]


def choose(text: str) -> list[Cell]:
    """Cells by name, `named` or `matrix` (all of them), or a pattern such as `150ms-*-bbr`; several with
    commas between. Raises UsageError for what names none.
    """
    matrix = {cell.label(): cell for cell in full_matrix()}
    known = {**NAMED_CELLS, **matrix}
    found: dict[str, Cell] = {}
    for name in text.split(","):
        if name in ("named", "matrix"):
            some = NAMED_CELLS if name == "named" else matrix
        else:
            some = {label: cell for label, cell in known.items() if fnmatchcase(label, name)}
        if not some:
            raise UsageError(
                f"cells: found {name}; known: named, matrix, {', '.join(NAMED_CELLS)}, and the matrix's, as "
                f"{next(iter(matrix))} (* stands for anything)"
            )
        found.update(some)
    return list(found.values())
