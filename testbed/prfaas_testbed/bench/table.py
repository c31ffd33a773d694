"""Rows as a table for people. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prfaas_testbed.bench.harness import Row, median


def rows_table(rows: Iterable[Row]) -> str:
    """A line for each engine and cell: median, lowest and highest goodput, processor seconds a gigabyte."""
    head = ("cell", "engine", "streams", "Mbit/s", "lowest", "highest", "CPU s/GB")
    lines: list[Sequence[str]] = [head]
    for row in rows:
        values = row["goodput_mbps"]
        cpu = [sample["cpu_s_per_gb"] for sample in row["samples"] if "cpu_s_per_gb" in sample]
        figures = (
            [f"{median(values):.1f}", f"{min(values):.1f}", f"{max(values):.1f}"] if values else ["-"] * 3
        )
        lines.append(
            (
                row["cell"],
                row["engine"],
                str(row["streams"] or "own"),
                *figures,
                f"{median(cpu):.2f}" if cpu else "-",
            )
        )
    return _aligned(lines)


def summary_table(cells: Iterable[Row]) -> str:
    head = ("cell", "prfaas", "best iperf3", "(streams)", "mooncake", "to iperf3", "to mooncake")
    lines: list[Sequence[str]] = [head]
    for cell in cells:
        lines.append(
            (
                cell["cell"],
                _figure(cell["prfaas_mbps"], ".1f"),
                _figure(cell["best_iperf3_mbps"], ".1f"),
                _figure(cell["best_iperf3_streams"], "d"),
                _figure(cell["mooncake_mbps"], ".1f"),
                _figure(cell["to_best_iperf3"], ".3f"),
                _figure(cell["to_mooncake"], ".2f"),
            )
        )
    return _aligned(lines)


def checks_table(checks: Iterable[Row]) -> str:
    lines = [
        (check["outcome"], check["name"], _figure(check["value"], ".4g"), check["wanted"]) for check in checks
    ]
    return _aligned(lines)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ""
    for line in lines:
        # The first two columns are names, the rest figures.
        cells = [word.ljust(width) for word, width in zip(line[:2], widths[:2], strict=True)]
        cells += [word.rjust(width) for word, width in zip(line[2:], widths[2:], strict=True)]
        text += "  ".join(cells).rstrip() + "\n"
    return text
