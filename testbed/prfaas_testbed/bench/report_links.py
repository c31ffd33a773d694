"""The part of a run's page about emulated links: the named cells, and the whole matrix. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from prfaas_testbed.bench import checks
from prfaas_testbed.bench.cell import K_WARM_RTTS, K_WARM_S, Cell, full_matrix
from prfaas_testbed.bench.harness import Row, median
from prfaas_testbed.bench.matrix import K_STREAMS
from prfaas_testbed.bench.wording import cpu, is_wan, number, spread, table

K_MARK = " *"
K_OLDER = (
    "\n\\* Measured before all were asked for the same: what is held there against iperf3's span is prfaas "
    "and Mooncake from the first call to the last byte.\n"
)


def named(run: dict[str, Any], samples: Sequence[Row]) -> str:
    cells = [
        row
        for row in run["summary"]
        if row["cell"] not in matrix_labels()
        and any(is_wan(r) and r["cell"] == row["cell"] and not r.get("tls") for r in run["rows"])
    ]
    if not cells:
        return ""
    lines = []
    for cell in cells:
        rows = [row for row in run["rows"] if row["cell"] == cell["cell"]]
        ours = next(row for row in rows if row["engine"] == "prfaas")
        link = f"{ours['rtt_ms']:g} ms, {ours['rate_mbps']:g}, {100 * ours['loss']:g}%"
        link += " in bursts" if ours["burst_packets"] > 1 else ""
        lines.append(
            [
                cell["cell"] + _mark(samples, cell["cell"]),
                f"{link}, {ours['congestion_control']}", spread(ours["goodput_mbps"]),
                f"{number(cell['best_iperf3_mbps'])} (x{cell['best_iperf3_streams']})",
                number(cell["to_best_iperf3"], 2), number(cell["mooncake_mbps"]),
                number(cell["to_mooncake"], 1), _whole(samples, cell["cell"], "prfaas"),
                _whole(samples, cell["cell"], "iperf3", cell["best_iperf3_streams"]),
                cpu(samples, cell["cell"], "prfaas"),
                cpu(samples, cell["cell"], "iperf3", cell["best_iperf3_streams"]),
                cpu(samples, cell["cell"], "mooncake"),
            ]
        )  # fmt: skip
    head = ["cell", "link", "prfaas", "best iperf3", "ratio", "Mooncake", "ratio", "prfaas, whole"]
    head += ["iperf3, whole", *_cpu_heads()]
    return (
        "## Over a link\n\n"
        "The number of streams and the congestion control are the engine's choice; iperf3 was run at 1, 4, "
        "8, 16 and 32 streams once, and its best went on. Wanted: "
        f"{checks.K_TO_IPERF3} of it.\n\nAll are asked for the same: what they carry while there is always "
        f"more to send, their first {K_WARM_S:g} s (or {K_WARM_RTTS} round trips) left out, as on a link for "
        "which transfers wait. Of iperf3 it is the receiver's figure; of the others what lies in the "
        "receiver's pages when that time begins and when it ends, whatever the engine says of it. No figure "
        "counts for more than full frames carry. `whole` leaves nothing out: of prfaas from the first call "
        "to the last byte in its page, its streams open before; of iperf3 from connections that are cold, "
        "without the way of the last bytes.\n\n"
        + table(head, lines)
        + (K_OLDER if any(K_MARK in line[0] for line in lines) else "")
        + _secure(run["rows"], samples)
        + _nixl(run["rows"])
    )


def _mark(samples: Iterable[Row], cell: str) -> str:
    """Of a cell that an older bench measured."""
    ours = [one for one in samples if (one["cell"], one["engine"]) == (cell, "prfaas")]
    return "" if all("over" in one for one in ours) else K_MARK


def _whole(samples: Iterable[Row], cell: str, engine: str, streams: int | None = None) -> str:
    found = [
        one["whole_mbps"]
        for one in samples
        if (one["cell"], one["engine"], one["streams"]) == (cell, engine, streams) and one.get("whole_mbps")
    ]
    return number(median(found)) if found else "-"


def _secure(rows: Sequence[Row], samples: Sequence[Row]) -> str:
    """Where it was measured with mutual TLS too."""
    ours = {row["cell"]: row for row in rows if row["engine"] == "prfaas" and is_wan(row)}
    lines = [
        [
            cell, spread(row["goodput_mbps"]), spread(secure["goodput_mbps"]),
            number(median(secure["goodput_mbps"]) / median(row["goodput_mbps"]), 2),
            cpu(samples, cell, "prfaas"), cpu(samples, checks.with_tls(cell), "prfaas"),
        ]
        for cell, row in ours.items()
        if (secure := ours.get(checks.with_tls(cell))) and secure["goodput_mbps"] and row["goodput_mbps"]
    ]  # fmt: skip
    if not lines:
        return ""
    head = ["cell", "prfaas", "with mutual TLS", "ratio", "CPU s/GB", "with TLS"]
    return (
        f"\nWith mutual TLS, as between sites, right after. Wanted: {checks.K_TLS_TO_PLAIN} of what it is "
        "without.\n\n" + table(head, lines)
    )


def _nixl(rows: Sequence[Row]) -> str:
    """Where it was measured over a link."""
    found = [
        f"{row['cell']} {number(median(row['goodput_mbps']))}"
        for row in rows
        if row["engine"] == "nixl" and is_wan(row) and row["goodput_mbps"]
    ]
    return f"\nNIXL over UCX's TCP, once each: {', '.join(found)} Mbit/s.\n" if found else ""


def matrix_labels() -> dict[str, Cell]:
    return {cell.label(): cell for cell in full_matrix()}


def matrix_table(run: dict[str, Any]) -> str:
    """A line for each rate, loss and congestion control, a column for each round trip: goodput, and beside
    the best iperf3 and Mooncake.
    """
    known = matrix_labels()
    found = {row["cell"]: row for row in run["summary"] if row["cell"] in known and row["to_best_iperf3"]}
    if not found:
        return ""
    trips = sorted({cell.rtt_ms for cell in known.values() if cell.rtt_ms})
    lines: dict[tuple[str, str, str], list[str]] = {}
    for label, cell in known.items():
        kind = (
            f"{cell.rate_mbps:g}",
            str(cell.loss).replace(":burst=8", " in bursts"),
            cell.congestion_control,
        )
        row = found.get(label)
        text = "-"
        if row is not None:
            theirs = row["to_mooncake"]
            text = f"{row['prfaas_mbps']:.0f}, {row['to_best_iperf3']:.2f}"
            text += f", {theirs:.1f}" if theirs else ""
        lines.setdefault(kind, ["-"] * len(trips))[trips.index(cell.rtt_ms or 0.0)] = text
    short = sum(row["to_best_iperf3"] < checks.K_TO_IPERF3 for row in found.values())
    below = sum((row["to_mooncake"] or 2.0) < checks.K_TO_MOONCAKE for row in found.values())
    return (
        "## The whole matrix\n\n"
        f"Each cell once: Mbit/s, its ratio to the best iperf3 over {_counts(K_STREAMS)} streams, its "
        f"ratio to Mooncake. {len(found)} of {len(known)} cells measured; {short} below "
        f"{checks.K_TO_IPERF3} of iperf3, {below} below Mooncake.\n\n"
        + table(
            ["Mbit/s", "loss", "allowed", *(f"{trip:g} ms" for trip in trips)],
            [[*kind, *texts] for kind, texts in lines.items()],
        )
    )


def _counts(numbers: Sequence[int]) -> str:
    *first, last = [str(number) for number in numbers]
    return f"{', '.join(first)} and {last}"


def _cpu_heads() -> list[str]:
    return ["CPU s/GB", "iperf3's", "Mooncake's"]
