"""A run's page from its run.json alone: RESULTS/bench/README.md, and figures beside the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prfaas.config.run import read_run
from prfaas.figures import new_figure, save, series
from prfaas_testbed.bench import checks, matrix, neighbour
from prfaas_testbed.bench.cell import Cell, full_matrix
from prfaas_testbed.bench.harness import Row, median
from prfaas_testbed.bench.host import added_ms

K_TARGET_BPS = 100e9


def write(folder: Path) -> list[Path]:
    """The page and the figures; their paths. Raises UsageError when there is no run."""
    run = read_run(folder).model_dump()
    samples = [sample for one in run["repetitions"] for sample in one["samples"]]
    drawn = _draw(run, folder)
    page = folder.parent / "README.md"
    page.write_text(text(run, samples, folder.name, [file.name for file in drawn if file.suffix == ".svg"]))
    return [page, *drawn]


def text(run: dict[str, Any], samples: Sequence[Row], stamp: str, figures: Sequence[str] = ()) -> str:
    """The page. Pure."""
    parts = [
        _head(run, stamp, samples),
        "".join(f"![{name}]({stamp}/{name})\n" for name in figures),
        _wan(run, samples),
        _matrix(run),
        _loopback(run, samples),
        _latency(run["measures"].get("latency", [])),
        _host(run["measures"].get("host", [])),
        _faults(run["measures"]),
        _cost(run, samples),
        _checks(run["checks"]),
    ]
    return "\n".join(part for part in parts if part)


def _head(run: dict[str, Any], stamp: str, samples: Sequence[Row]) -> str:
    machine = run["machine"]
    loads = [one["load_1min"] for one in samples if one.get("load_1min") is not None]
    made = [
        f"{one['part']} at {one['ended']} on {one['commit'][:10]}"
        + (f" in {one['took_s']:.0f} s" if one.get("took_s") else "")
        for one in run.get("made", [])
    ]
    return (
        "# The transfer engine beside its peers\n\n"
        f"Drawn by `prfaas bench report` from `{stamp}/run.json`, which holds every raw value. Link: "
        f"{run['emulation']}. Machine: {machine.get('cpu') or machine.get('processor') or 'see run.json'}, "
        f"{machine.get('cores') or machine.get('cpus')} cores, which the emulated link, both ends and their "
        "peers share. Goodput in Mbit/s, the median of the repetitions (lowest to highest).\n\n"
        f"Measured: {'; '.join(made)}.\n\n"
        f"Load averages when repetitions began: {_spread(loads)}. What is far above the two ends' own work "
        "is others': such figures compare what ran in the same minutes, and aren't what the machine can do.\n"
    )


def _wan(run: dict[str, Any], samples: Sequence[Row]) -> str:
    cells = [
        row
        for row in run["summary"]
        if row["cell"] not in _matrix_labels()
        and any(_is_wan(r) and r["cell"] == row["cell"] for r in run["rows"])
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
                cell["cell"], f"{link}, {ours['congestion_control']}", _spread(ours["goodput_mbps"]),
                f"{_number(cell['best_iperf3_mbps'])} (x{cell['best_iperf3_streams']})",
                _number(cell["to_best_iperf3"], 2), _number(cell["mooncake_mbps"]),
                _number(cell["to_mooncake"], 1), _cpu(samples, cell["cell"], "prfaas"),
                _cpu(samples, cell["cell"], "iperf3", cell["best_iperf3_streams"]),
                _cpu(samples, cell["cell"], "mooncake"),
            ]
        )  # fmt: skip
    head = ["cell", "link", "prfaas", "best iperf3", "ratio", "Mooncake", "ratio", *_cpu_heads()]
    return (
        "## Over a link\n\n"
        "The number of streams and the congestion control are the engine's choice; iperf3 was run at 1, 4, "
        "8, 16 and 32 streams once, and its best went on, bounded by what the link carries. Wanted: "
        f"{checks.K_TO_IPERF3} of it.\n\n" + _table(head, lines) + _nixl(run["rows"])
    )


def _nixl(rows: Sequence[Row]) -> str:
    """Where it was measured over a link."""
    found = [
        f"{row['cell']} {_number(median(row['goodput_mbps']))}"
        for row in rows
        if row["engine"] == "nixl" and _is_wan(row) and row["goodput_mbps"]
    ]
    return f"\nNIXL over UCX's TCP, once each: {', '.join(found)} Mbit/s.\n" if found else ""


def _matrix_labels() -> dict[str, Cell]:
    return {cell.label(): cell for cell in full_matrix()}


def _matrix(run: dict[str, Any]) -> str:
    """A line for each rate, loss and congestion control, a column for each round trip: goodput, and beside
    the best iperf3 and Mooncake.
    """
    known = _matrix_labels()
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
        f"Each cell once: Mbit/s, its ratio to the best iperf3 over {_counts(matrix.K_STREAMS)} streams, its "
        f"ratio to Mooncake. {len(found)} of {len(known)} cells measured; {short} below "
        f"{checks.K_TO_IPERF3} of iperf3, {below} below Mooncake.\n\n"
        + _table(
            ["Mbit/s", "loss", "allowed", *(f"{trip:g} ms" for trip in trips)],
            [[*kind, *texts] for kind, texts in lines.items()],
        )
    )


def _counts(numbers: Sequence[int]) -> str:
    *first, last = [str(number) for number in numbers]
    return f"{', '.join(first)} and {last}"


def _loopback(run: dict[str, Any], samples: Sequence[Row]) -> str:
    rows = [row for row in run["rows"] if not _is_wan(row)]
    lines = [
        [
            row["cell"], row["engine"], str(row["streams"] or "own"), _spread(row["goodput_mbps"]),
            _cpu(samples, row["cell"], row["engine"], row["streams"]),
        ]
        for row in rows
        if row["goodput_mbps"]
    ]  # fmt: skip
    head = ["cell", "engine", "streams", "Mbit/s", "CPU s/GB"]
    return "## Over loopback\n\n" + _table(head, lines) if lines else ""


def _latency(rows: Sequence[Row]) -> str:
    lines = [
        [
            f"{row['size_bytes'] / 1e6:g} MB", "rested" if row["rest_s"] else "warm",
            f"{1e3 * row['ideal_s']:.0f}", f"{1e3 * median(row['sender_s']):.0f}",
            f"{median(row['sender_s']) / row['ideal_s']:.2f}",
            " ".join(f"{value / row['ideal_s']:.2f}" for value in row["sender_s"]),
        ]
        for row in rows
    ]  # fmt: skip
    if not lines:
        return ""
    link = f"{rows[0]['rtt_ms']:g} ms, {rows[0]['rate_mbps']:g} Mbit/s"
    return (
        f"## From the last byte ready to success ({link})\n\nIdeal: a round trip and the bytes' own time.\n\n"
        + _table(["bytes", "link", "ideal, ms", "ms", "ratio", "each"], lines)
    )


def _host(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["engine"], row["end"], f"{median([one['p99_ms'] for one in row['quiet']]):.2f}",
            f"{median([one['p99_ms'] for one in row['loaded']]):.2f}", f"{added_ms(row):+.2f}",
            _number(median(row["goodput_mbps"])),
        ]
        for row in rows
    ]  # fmt: skip
    if not lines:
        return ""
    head = ["engine", "end", "p99 quiet, ms", "p99 loaded, ms", "added, ms", "Mbit/s"]
    return "## What a transfer adds to a busy Python loop in its process\n\n" + _table(head, lines)


def _faults(measures: dict[str, Any]) -> str:
    lines = [
        f"- Link cut for {row['down_s']:g} s in the middle of {row['size_bytes'] / 1e6:g} MB: an idle lease "
        f"beside it ended in {1e3 * row['freed_s']:.1f} ms meanwhile; the transfer was through "
        f"{row['after_s']:.2f} s after the cut's end; {row['streams_lost']} streams replaced, "
        f"{row['payload_bytes'] / row['size_bytes']:.2f} times its bytes received."
        for row in measures.get("outage", [])
    ]
    if row := measures.get("abandoned"):
        lines.append(
            f"- A lease ended with the link down and {row['size_bytes'] / 1e6:g} MB to it under way "
            f"({row['received_bytes'] / 1e6:.1f} there): pages back in {row['freed_s'] * 1e3:.1f} ms, "
            f"{'not one byte' if row['untouched'] else 'BYTES'} written to them afterwards; the sender heard "
            f"{row['told_s']:.2f} s after the link's return."
        )
    if share := measures.get("share"):
        each = ", ".join(f"{name} {mbps:.0f}" for name, mbps in share["goodput_mbps"].items())
        lines.append(
            f"- Three senders in three namespaces under one ledger, {share['rate_mbps']:g} Mbit/s: {each} "
            f"Mbit/s (Jain's index {share['jain']:.3f}){_together(share)}; promised at most "
            f"{share['most_promised']:.3f} of the estimate in {len(share['looks'])} looks; "
            f"{share['admitted']} admitted, {share['refused']} refused, "
            f"{share['missed']} late, {share['failed']} failed."
        )
    if beside := measures.get("neighbour"):
        lines.append(
            f"- A server beside a stopped one behind the same pump keeps {beside['kept']:.2f} of the "
            f"goodput that it has beside a running one (wanted {neighbour.K_LEAST_KEPT}); each round: "
            + ", ".join(
                f"{stopped:.0f}/{running:.0f}"
                for stopped, running in zip(beside["stopped_mbps"], beside["running_mbps"], strict=True)
            )
            + " Mbit/s."
        )
    return "## Faults and neighbours\n\n" + "\n".join(lines) + "\n" if lines else ""


def _together(share: Row) -> str:
    """An older run doesn't say."""
    return f", together {share['together_mbps']:.0f} to the last byte" if "together_mbps" in share else ""


def _cost(run: dict[str, Any], samples: Sequence[Row]) -> str:
    rows = run["measures"].get("stages", [])
    if not rows:
        return ""
    stages = {row["stage"]: median(row["cpu_s_per_gb"]) for row in rows}
    plain = _cpu_value(samples, "loopback-64k", "prfaas")
    secure = _cpu_value(samples, "loopback-64k-tls", "prfaas")
    lines = [[stage, f"{value:.3f}"] for stage, value in stages.items()]
    alone = sum(value for stage, value in stages.items() if stage != "TLS")
    lines.append(["all but TLS", f"{alone:.3f}"])
    peers = [("prfaas, whole", plain), ("prfaas with TLS, whole", secure)]
    peers += [
        (name, _cpu_value(samples, cell, name))
        for name, cell in (
            ("mooncake", "loopback-64k"),
            ("nixl", "loopback-64k"),
            ("iperf3", "loopback-contiguous"),
        )
    ]
    lines += [[name, f"{value:.3f}"] for name, value in peers if value is not None]
    return (
        "## Processor seconds a gigabyte\n\n"
        "Each stage alone on scattered 64 KiB segments, both ends together, beside the whole engines over "
        "loopback. What prfaas uses above the sum of its stages is its own turns, and caches that two "
        "processes share.\n\n"
        + _table(["", "CPU s/GB, both ends"], lines)
        + _projection(run["measures"].get("scaling") or {}, alone, stages.get("TLS", 0.0), plain, secure)
        + _slices(run["measures"].get("slices", []))
    )


def _slices(rows: Sequence[Row]) -> str:
    """An older run hasn't any."""
    if not rows:
        return ""
    lines = []
    for row in rows:
        costs = [f"{median(row[what]):.2f}" for what in ("cpu_s_per_gb", "seconds_per_gb")]
        lines.append([str(row["slice_bytes"]), row["way"], *costs])
    return (
        "\n## Slices of unequal tensor parallelism\n\n"
        "One of two slices of each token, from one rank's memory to between the other's bytes (scattered), "
        "or the reverse (gathered), beside the same bytes in pieces of 1 MiB.\n\n"
        + _table(["bytes", "", "CPU s/GB, both pumps", "s/GB"], lines)
    )


def _projection(scaling: Row, alone: float, tls: float, plain: float | None, secure: float | None) -> str:
    gb_per_s = K_TARGET_BPS / 8e9
    lines = ["", "### Towards 100 Gbit/s", ""]
    if scaling.get("gain"):
        lines.append(
            f"Two pairs of pumps, each pair on a core of its own, carry {scaling['gain']:.2f} times what one "
            f"does ({_spread(scaling['one_pair_mbps'])} and {_spread(scaling['two_pairs_mbps'])} Mbit/s): "
            "this is as far as this machine shows how it grows.\n"
        )
    for name, whole, floor in (("plain", plain, alone), ("with TLS", secure, alone + tls)):
        if whole is not None:
            lines.append(
                f"- {name}: {gb_per_s:g} GB/s at {whole:.2f} s/GB is {gb_per_s * whole:.1f} cores of this "
                f"kind over both sites, {gb_per_s * whole / 2:.1f} a site; the stages alone would take "
                f"{gb_per_s * floor:.1f}."
            )
    lines.append(
        "\nThis is arithmetic, not a measurement. It rests on: a cost a byte that stays what it is on two "
        "cores (loopback has no driver, and segments of 64 KiB, as a NIC with segmentation offload has); "
        "pumps that share nothing but the ledger, one a core, their transfers spread over them; and memory "
        f"that carries each byte about six times ({6 * gb_per_s:g} GB/s a site)."
    )
    return "\n".join(lines) + "\n"


def _checks(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    passed = sum(row["outcome"] == "passed" for row in rows)
    missed = [
        [row["name"], _number(row["value"], 3), row["wanted"]] for row in rows if row["outcome"] != "passed"
    ]
    page = f"## Checks\n\n{passed} of {len(rows)} passed."
    return page + (" Short:\n\n" + _table(["check", "value", "wanted"], missed) if missed else "\n")


def _draw(run: dict[str, Any], folder: Path) -> list[Path]:
    cells = [
        cell
        for cell in run["summary"]
        if cell["best_iperf3_mbps"] and cell["mooncake_mbps"] and cell["cell"] not in _matrix_labels()
    ]
    if not cells:
        return []
    figure, (axes,) = new_figure(1, 1, width=8.0, height=3.6)
    rows = []
    for place, (name, key) in enumerate(
        (("prfaas", "prfaas_mbps"), ("iperf3", "best_iperf3_mbps"), ("mooncake", "mooncake_mbps"))
    ):
        look = series(name)
        at = [index + 0.27 * (place - 1) for index in range(len(cells))]
        axes.bar(at, [cell[key] for cell in cells], 0.25, color=look.colour, label=look.label)
    for index, cell in enumerate(cells):
        ours = next(r for r in run["rows"] if r["cell"] == cell["cell"] and r["engine"] == "prfaas")
        axes.plot([index - 0.27] * len(ours["goodput_mbps"]), ours["goodput_mbps"], "k.", markersize=3)
        rows.append([cell["cell"], cell["prfaas_mbps"], cell["best_iperf3_mbps"], cell["mooncake_mbps"]])
    axes.set_xticks(range(len(cells)), [cell["cell"] for cell in cells], rotation=20, ha="right")
    axes.set(ylabel="Mbit/s", title="Goodput over emulated links, median; dots: each repetition of prfaas")
    axes.legend()
    return save(figure, folder, "wan", ["cell", "prfaas_mbps", "best_iperf3_mbps", "mooncake_mbps"], rows)


def _is_wan(row: Row) -> bool:
    return row["rtt_ms"] is not None


def _cpu_heads() -> list[str]:
    return ["CPU s/GB", "iperf3's", "Mooncake's"]


def _cpu_value(samples: Iterable[Row], cell: str, engine: str, streams: int | None = None) -> float | None:
    found = [
        one["cpu_s_per_gb"]
        for one in samples
        if one["cell"] == cell
        and one["engine"] == engine
        and one.get("cpu_s_per_gb") is not None
        and (streams is None or one["streams"] == streams)
    ]
    return median(found) if found else None


def _cpu(samples: Iterable[Row], cell: str, engine: str, streams: int | None = None) -> str:
    return _number(_cpu_value(samples, cell, engine, streams), 2)


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else "-"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
