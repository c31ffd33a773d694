"""What the bench consists of: cells over an emulated link, loopback, what a transfer does to its host
process, and what faults and neighbours do to a transfer.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prfaas_testbed.bench import (
    checks,
    host,
    latency,
    matrix,
    neighbour,
    outage,
    scaling,
    share,
    slices,
    stages,
)
from prfaas_testbed.bench.cell import NAMED_CELLS, Cell, full_matrix
from prfaas_testbed.bench.harness import (
    Progress,
    Row,
    engines_for,
    installed_peers,
    measure_cell,
)
from prfaas_testbed.bench.places import Loopback, emulated
from prfaas_testbed.bench.record import Record

PARTS = ("wan", "loopback", "latency", "host", "cost", "faults", "matrix")
K_HOUR_LONG = ("matrix",)
"""Parts that are measured only when they are asked for."""
K_STREAMS_EQUAL = 2  # of iperf3 and prfaas over loopback: as many as this bench's smallest machine has cores
K_LIKE_IPERF3 = 4
"""So many times the bytes where iperf3 is the measure: it runs for seconds, its first one left out, and a GB
is over in 0.4 s, each process's way to a core of its own included.
"""
K_NIXL_CELLS = ("wan-clean", "wan-thin-loss")
"""NIXL over UCX's TCP moves a few Mbit/s over a link: two cells show it."""
K_COARSE_BYTES = 1 << 20
K_COARSE_CELLS = ("wan-clean", "wan-loss", "wan-burst")
"""Mooncake waits a round trip for each segment of a connection: measured at this size too, where it does
best. Three cells show it: no loss, and 1% of both kinds.
"""

K_TLS_CELLS = ("wan-clean", "wan-loss", "ocean-loss-bbr")
"""Few streams, the most of them, and the longest path: what mutual TLS costs is measured on these."""

Keep = Callable[[list[Row], list[dict[str, Any]]], None]


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    cells: tuple[Cell, ...]
    repetitions: int
    limit_s: float
    streams_iperf3: tuple[int, ...] | None
    matrix: tuple[Cell, ...]
    """Each once, in the part of that name."""
    matrix_limit_s: float
    """Of a repetition there: longer, for there is one alone."""
    matrix_for_s: float | None
    """No cell of it is begun after so long."""
    loopback_bytes: int
    loopback_repetitions: int
    host_s: float
    stage_s: float
    slices_bytes: int
    """Of each size and way."""
    latency_bytes: tuple[int, ...]
    downs_s: tuple[float, ...]
    """How long the link is cut in the middle of a transfer."""
    share_rounds: int
    """Of each of three senders' transfers."""
    judge: bool
    """Whether figures are held against what is promised; a smoke run only shows that all of it runs."""

    @classmethod
    def full(
        cls, repetitions: int, *, cells: Sequence[Cell] = (), matrix_for_s: float | None = None
    ) -> Sizes:
        """`cells`: these of the named ones and of the matrix; none: all."""
        return cls(
            cells=tuple(cell for cell in NAMED_CELLS.values() if cell in cells or not cells),
            repetitions=repetitions,
            # BBR rests for 0.2 s in every 10: the shorter a repetition, the fewer of the five that hold one.
            limit_s=2.0,
            streams_iperf3=None,
            matrix=tuple(cell for cell in full_matrix() if cell in cells or not cells),
            matrix_limit_s=3.0,
            matrix_for_s=matrix_for_s,
            loopback_bytes=1_000_000_000,
            loopback_repetitions=repetitions,
            host_s=2.0,
            stage_s=0.5,
            slices_bytes=slices.K_PAYLOAD_BYTES,
            latency_bytes=(1_000_000, 4_000_000, 16_000_000),
            downs_s=(2.0, 30.0),
            share_rounds=6,
            judge=True,
        )

    @classmethod
    def smoke(cls) -> Sizes:
        cell = NAMED_CELLS["wan-thin-loss"].with_(total_bytes=10_000_000)
        return cls(
            cells=(cell,),
            repetitions=1,
            limit_s=1.0,
            streams_iperf3=(4,),
            matrix=(),
            matrix_limit_s=1.0,
            matrix_for_s=None,
            loopback_bytes=100_000_000,
            loopback_repetitions=1,
            host_s=1.0,  # the least that iperf3 takes
            stage_s=0.1,
            slices_bytes=slices.K_TRANSFER_BYTES,
            latency_bytes=(1_000_000,),
            downs_s=(1.0,),
            share_rounds=1,
            judge=False,
        )


def measure_cells(
    cells: Sequence[Cell],
    peers: Sequence[str],
    workdir: Path,
    *,
    repetitions: int,
    limit_s: float,
    progress: Progress,
    streams_iperf3: Sequence[int] | None = None,
    coarse: bool = False,
    narrow: bool = False,
    secure: bool = False,
    keep: Keep | None = None,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of all cells, those over an emulated link in one network, and what their places say of themselves.

    `narrow`: see measure_cell. `coarse`: measure the peers that write segment by segment at K_COARSE_BYTES
    too. `secure`: measure prfaas in K_TLS_CELLS with mutual TLS as well. `keep` gets a cell's rows after each
    round, and what their place says of itself. Raises MachineError.
    """
    rows: list[Row] = []
    places: list[dict[str, Any]] = []

    def kept(found: list[Row]) -> None:
        if keep is not None:
            keep(found, places)

    wan = [cell for cell in cells if cell.emulated]
    with ExitStack() as stack:
        if wan:
            place = stack.enter_context(emulated(wan[0], workdir, progress))
            places.append(place.describe())
            for cell in wan:
                place.shape(cell)
                engines = engines_for(cell, peers_for(cell, peers) if narrow else peers, streams_iperf3)
                measured = measure_cell(
                    place,
                    cell,
                    engines,
                    repetitions=repetitions,
                    limit_s=limit_s,
                    progress=progress,
                    narrow=narrow,
                    keep=kept,
                )
                if coarse and "mooncake" in peers and cell.name in K_COARSE_CELLS:
                    large = cell.with_(segment_bytes=K_COARSE_BYTES, name=cell.name or cell.label())
                    others = [
                        engine for engine in engines_for(large, ["mooncake"]) if engine.name != "prfaas"
                    ]
                    measured += measure_cell(
                        place, large, others, repetitions=1, limit_s=limit_s, progress=progress
                    )
                if secure and cell.name in K_TLS_CELLS:
                    encrypted = cell.with_(tls=True, name=checks.with_tls(cell.name))
                    measured += measure_cell(
                        place, encrypted, engines_for(encrypted, []), repetitions=repetitions,
                        limit_s=limit_s, progress=progress, keep=kept,
                    )  # fmt: skip
                rows += measured
    for cell in cells:
        if not cell.emulated:
            local = Loopback(workdir)
            engines = engines_for(cell, peers, streams_iperf3)
            rows += measure_cell(
                local, cell, engines, repetitions=repetitions, limit_s=limit_s, progress=progress, keep=kept
            )
    return rows, places


def peers_for(cell: Cell, peers: Sequence[str]) -> list[str]:
    """Those that are measured in a cell over a link. Pure."""
    return [peer for peer in peers if peer != "nixl" or cell.name in K_NIXL_CELLS]


def run_parts(parts: Sequence[str], record: Record, sizes: Sizes, progress: Progress) -> None:
    """The parts asked for, into the record, which is written as they go on. Raises MachineError."""
    run: dict[str, Callable[[Record, Sizes, Path, Progress], None]] = {
        "wan": _wan,
        "loopback": _loopback,
        "latency": _latency,
        "host": _host,
        "cost": _cost,
        "faults": _faults,
        "matrix": _matrix,
    }
    for part in PARTS:
        if part in parts:
            began_s = time.monotonic()
            try:
                with tempfile.TemporaryDirectory(prefix="prfaas-bench-") as workdir:
                    run[part](record, sizes, Path(workdir), progress)
            except BaseException:
                record.cut_short(part, time.monotonic() - began_s)
                raise
            record.finished(part, time.monotonic() - began_s, whole=_is_whole(part, sizes))


def _is_whole(part: str, sizes: Sizes) -> bool:
    """Whether all of a part is measured at one go."""
    return part not in K_HOUR_LONG and (part != "wan" or len(sizes.cells) == len(NAMED_CELLS))


def _keeping(record: Record, judge: Callable[[list[Row]], list[Row]] | None) -> Keep:
    """What keeps a cell's rows, and judges them."""

    def keep(rows: list[Row], places: list[dict[str, Any]]) -> None:
        _take(record, rows, places)
        record.keep(judge(rows) if judge is not None else ())

    return keep


def _wan(record: Record, sizes: Sizes, workdir: Path, progress: Progress) -> None:
    peers = installed_peers()
    rows, places = measure_cells(
        sizes.cells,
        peers,
        workdir,
        repetitions=sizes.repetitions,
        limit_s=sizes.limit_s,
        progress=progress,
        streams_iperf3=sizes.streams_iperf3,
        coarse=sizes.judge,
        narrow=True,
        secure=sizes.judge,
        keep=_keeping(record, checks.judge_wan if sizes.judge else None),
    )
    _take(record, rows, places)
    if sizes.judge:
        record.judged(checks.judge_wan(rows))


def _matrix(record: Record, sizes: Sizes, workdir: Path, progress: Progress) -> None:
    left = matrix.measure(
        record, sizes.matrix, workdir, limit_s=sizes.matrix_limit_s, for_s=sizes.matrix_for_s,
        progress=progress,
    )  # fmt: skip
    if left:
        progress(
            f"matrix: {len(sizes.matrix) - len(left)} of {len(sizes.matrix)} cells are measured; "
            f"`prfaas bench all --parts matrix --into {record.folder}` goes on"
        )


def loopback_cells(total_bytes: int) -> list[tuple[Cell, list[str]]]:
    """Each cell with the peers it is held against."""
    base = Cell(total_bytes=total_bytes)
    equal = base.with_(
        contiguous=True, streams=K_STREAMS_EQUAL, name="loopback-contiguous",
        total_bytes=K_LIKE_IPERF3 * total_bytes,
    )  # fmt: skip
    pools = [peer for peer in installed_peers() if peer != "iperf3"]
    return [
        (equal, ["iperf3"]),
        (base.with_(name="loopback-64k"), pools),
        (base.with_(tls=True, name="loopback-64k-tls"), []),
        (base.with_(segment_bytes=4096, total_bytes=max(4096, total_bytes // 4), name="loopback-4k"), []),
        (
            base.with_(
                segment_bytes=4096,
                total_bytes=4096 * checks.K_SEGMENTS_IN_ONE_CALL,
                name="loopback-100k-segments",
                one_call=True,
            ),
            [],
        ),
    ]


def _loopback(record: Record, sizes: Sizes, workdir: Path, progress: Progress) -> None:
    rows: list[Row] = []
    for cell, peers in loopback_cells(sizes.loopback_bytes):
        found, places = measure_cells(
            [cell],
            peers,
            workdir,
            repetitions=sizes.loopback_repetitions,
            limit_s=sizes.limit_s,
            progress=progress,
            keep=_keeping(record, None),
        )
        rows += found
        _take(record, found, places)
    if sizes.judge:
        record.judged(checks.judge_loopback(rows))


def _latency(record: Record, sizes: Sizes, workdir: Path, progress: Progress) -> None:
    def keep(rows: list[Row]) -> None:
        judged = latency.judge(rows) if sizes.judge else []
        record.keep_measures("latency", rows, ("size_bytes", "rest_s"), judged)

    cell = NAMED_CELLS["wan-clean"]
    with emulated(cell, workdir, progress) as place:
        record.add_place(place.describe())
        latency.measure(place, cell, sizes.latency_bytes, sizes.repetitions, progress, keep)


def _host(record: Record, sizes: Sizes, workdir: Path, progress: Progress) -> None:
    def keep(rows: list[Row]) -> None:
        judged = host.judge(rows) if sizes.judge else []
        record.keep_measures("host", rows, ("engine", "end"), judged)

    host.measure(workdir, sizes.host_s, sizes.loopback_repetitions, progress, keep)


def _cost(record: Record, sizes: Sizes, workdir: Path, progress: Progress) -> None:
    record.measures["stages"] = stages.measure(workdir, sizes.stage_s, sizes.loopback_repetitions, progress)
    record.keep()
    record.measures["scaling"] = scaling.measure(workdir, sizes.host_s, sizes.loopback_repetitions, progress)
    record.keep()
    found = slices.measure(workdir, sizes.loopback_repetitions, progress, sizes.slices_bytes)
    record.measures["slices"] = found
    if sizes.judge:
        record.judged(slices.judge(found))


def _faults(record: Record, sizes: Sizes, workdir: Path, progress: Progress) -> None:
    cell = NAMED_CELLS["wan-clean"]
    folders = [workdir / name for name in ("outage", "share", "neighbour")]
    for folder in folders:
        folder.mkdir()

    def keep(name: str, found: Any, judge: Callable[[Any], list[Row]]) -> None:
        record.measures[name] = found
        record.keep(judge(found) if sizes.judge else ())

    with emulated(cell, folders[0], progress) as place:
        record.add_place(place.describe())
        keep("outage", outage.measure(place, cell, sizes.downs_s, progress), outage.judge)
        keep("abandoned", outage.abandon(place, cell, sizes.downs_s[0], progress), outage.judge_abandoned)
    with share.group(folders[1], progress) as (senders, shared):
        record.add_place(shared.describe())
        keep("share", share.measure(senders, sizes.share_rounds, progress), share.judge)
    beside = neighbour.measure(folders[2], sizes.host_s, sizes.loopback_repetitions, progress)
    keep("neighbour", beside, neighbour.judge)


def _take(record: Record, rows: list[Row], places: list[dict[str, Any]]) -> None:
    record.replace(rows)
    for place in places:
        record.add_place(place)
