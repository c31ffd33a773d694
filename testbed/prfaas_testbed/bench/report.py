"""A run's page from its run.json alone: RESULTS/bench/README.md, and figures beside the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prfaas.figures import new_figure, save, series
from prfaas_testbed.bench import neighbour
from prfaas_testbed.bench.harness import Row, median
from prfaas_testbed.bench.host import added_ms, own_added_ms
from prfaas_testbed.bench.record import read_record
from prfaas_testbed.bench.report_links import matrix_labels, matrix_table, named
from prfaas_testbed.bench.wording import cpu, cpu_value, is_wan, number, spread, table

K_TARGET_BPS = 100e9


def write(folder: Path) -> list[Path]:
    """The page and the figures; their paths. Raises UsageError when there is no run."""
    run = read_record(folder).model_dump()
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
        named(run, samples),
        matrix_table(run),
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
    return (
        "# The transfer engine beside its peers\n\n"
        f"Drawn by `prfaas bench report` from `{stamp}/run.json`, which holds every raw value. Link: "
        f"{run['emulation']}. Machine: {machine.get('cpu') or machine.get('processor') or 'see run.json'}, "
        f"{machine.get('cores') or machine.get('cpus')} cores, which the emulated link, both ends and their "
        "peers share. Goodput in Mbit/s, the median of the repetitions (lowest to highest).\n\n"
        f"Measured: {'; '.join(_made(run.get('made', [])))}.\n\n"
        f"Load averages when repetitions began: {spread(loads)}. What is far above the two ends' own work "
        "is others': such figures compare what ran in the same minutes, and aren't what the machine can do.\n"
    )


def _made(notes: Sequence[Row]) -> list[str]:
    """Each part, in as many goes as it took: when it ended, on which commits, and how long that was."""
    parts: dict[str, list[Row]] = {}
    for note in notes:
        parts.setdefault(note["part"], []).append(note)
    found = []
    for part, goes in parts.items():
        ended = " to ".join(dict.fromkeys([goes[0]["ended"], goes[-1]["ended"]]))
        commits = ", ".join(dict.fromkeys(note["commit"][:10] for note in goes))
        took_s = [note["took_s"] for note in goes if note.get("took_s")]
        in_goes = f" in {len(goes)} goes" if len(goes) > 1 else ""
        took = f" in {sum(took_s):.0f} s" if took_s else ""
        found.append(f"{part}{in_goes} at {ended} on {commits}{took}")
    return found


def _loopback(run: dict[str, Any], samples: Sequence[Row]) -> str:
    rows = [row for row in run["rows"] if not is_wan(row)]
    lines = [
        [
            row["cell"], row["engine"], str(row["streams"] or "own"), spread(row["goodput_mbps"]),
            cpu(samples, row["cell"], row["engine"], row["streams"]),
        ]
        for row in rows
        if row["goodput_mbps"]
    ]  # fmt: skip
    head = ["cell", "engine", "streams", "Mbit/s", "CPU s/GB"]
    return "## Over loopback\n\n" + table(head, lines) if lines else ""


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
        + table(["bytes", "link", "ideal, ms", "ms", "ratio", "each"], lines)
    )


def _host(rows: Sequence[Row]) -> str:
    lines = [
        [
            row["engine"], row["end"], f"{median([one['p99_ms'] for one in row['quiet']]):.2f}",
            f"{median([one['p99_ms'] for one in row['loaded']]):.2f}", f"{added_ms(row):+.2f}",
            number(own_added_ms(row), 2), number(median(row["goodput_mbps"])),
        ]
        for row in rows
    ]  # fmt: skip
    if not lines:
        return ""
    head = ["engine", "end", "p99 quiet, ms", "p99 loaded, ms", "added, ms", "but for a core", "Mbit/s"]
    return (
        "## What a transfer adds to a busy Python loop in its process\n\n"
        "Rounds of about 1 ms. The loop has a core to itself and all else the other; `bystander` is a loop "
        "in a process that transfers nothing, beside the same transfer; in `beside` and `control` (iperf3) "
        "nothing is set apart. `but for a core`: added without the time for which the loop's thread was "
        "ready to run and had no core, by the kernel's count; what is left is what locks and copies of its "
        "process's memory add.\n\n" + table(head, lines)
    )


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
    plain = cpu_value(samples, "loopback-64k", "prfaas")
    secure = cpu_value(samples, "loopback-64k-tls", "prfaas")
    lines = [[stage, f"{value:.3f}"] for stage, value in stages.items()]
    alone = sum(value for stage, value in stages.items() if stage != "TLS")
    lines.append(["all but TLS", f"{alone:.3f}"])
    peers = [("prfaas, whole", plain), ("prfaas with TLS, whole", secure)]
    peers += [
        (name, cpu_value(samples, cell, name))
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
        + table(["", "CPU s/GB, both ends"], lines)
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
        + table(["bytes", "", "CPU s/GB, both pumps", "s/GB"], lines)
    )


def _projection(scaling: Row, alone: float, tls: float, plain: float | None, secure: float | None) -> str:
    gb_per_s = K_TARGET_BPS / 8e9
    lines = ["", "### Towards 100 Gbit/s", ""]
    if scaling.get("gain"):
        lines.append(
            f"Two pairs of pumps, each pair on a core of its own, carry {scaling['gain']:.2f} times what one "
            f"does ({spread(scaling['one_pair_mbps'])} and {spread(scaling['two_pairs_mbps'])} Mbit/s): "
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
        [row["name"], number(row["value"], 3), row["wanted"]] for row in rows if row["outcome"] != "passed"
    ]
    page = f"## Checks\n\n{passed} of {len(rows)} passed."
    return page + (" Short:\n\n" + table(["check", "value", "wanted"], missed) if missed else "\n")


def _draw(run: dict[str, Any], folder: Path) -> list[Path]:
    cells = [
        cell
        for cell in run["summary"]
        if cell["best_iperf3_mbps"] and cell["mooncake_mbps"] and cell["cell"] not in matrix_labels()
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
