"""Figures of a plan, from the mapping that `prfaas plan --json` writes and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from prfaas.figures.style import new_figure, numbered, save, series


def draw_plan(result: dict[str, Any], folder: Path) -> list[Path]:
    """Whatever figures the result allows; the paths written."""
    if "curves" in result:
        drawn = [_optimum, _bandwidth, _baselines, _queues, _sensitivity]
        return [path for draw in drawn for path in draw(result, folder)]
    if "kv_throughput_gbps" in result:
        return _kv_table(result, folder)
    return _sites(result, folder)


def _thousands(value: float, _: int) -> str:
    return f"{value / 1000:g}K"


def _column(points: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [float("nan") if point[name] is None else point[name] for point in points]


def _optimum(result: dict[str, Any], folder: Path) -> list[Path]:
    """Throughput over the threshold and over the split, with what limits it: the report's figure 5."""
    figure, (left, right) = new_figure(1, 2, sharey=True)
    by_threshold, by_split = result["curves"]["threshold"], result["curves"]["split"]
    x = _column(by_threshold, "threshold_tokens")
    for name, key in (
        ("prfaas_limit", "prfaas_limit_rps"),
        ("local_limit", "local_limit_rps"),
        ("decode_limit", "decode_limit_rps"),
    ):
        left.plot(x, _column(by_threshold, key), **series(name).kwargs(markers=False))
    left.plot(
        x,
        _column(by_threshold, "throughput_rps"),
        **series("throughput").kwargs(markers=False) | {"linewidth": 3, "alpha": 0.45},
    )
    left.plot([result["threshold_tokens"]], [result["throughput_rps"]], **_point("throughput"))
    top = 1.6 * max(_column(by_split, "best_rps"))
    left.set(
        xscale="log",
        xlabel="Threshold t on the uncached length, tokens",
        ylabel="Requests/s",
        ylim=(0, top),
        title=f"Over the threshold, at {result['prefill']} prefill and {result['decode']} decode instances",
    )
    left.xaxis.set_major_formatter(FuncFormatter(_thousands))
    left.legend(loc="lower left")
    n = [point["prefill"] for point in by_split]
    right.plot(
        n, _column(by_split, "prefill_limit_rps"), **series("prfaas_limit").kwargs(label="All prefill")
    )
    right.plot(n, _column(by_split, "decode_limit_rps"), **series("decode_limit").kwargs())
    right.plot(
        n, _column(by_split, "held_rps"), **series("throughput").kwargs(label="System, threshold held")
    )
    right.plot(
        n,
        _column(by_split, "best_rps"),
        **series("best_threshold").kwargs(label="System, best threshold each"),
    )
    right.set(
        xlabel=f"Local prefill instances, of {n[-1] + 1}",
        title=f"Over the split, at t = {result['threshold_tokens'] / 1000:.1f}K",
    )
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(loc="upper right")
    columns = list(by_threshold[0])
    rows = [["threshold", *(p[c] for c in columns), *[None] * 7] for p in by_threshold]
    split = list(by_split[0])
    rows += [["split", *[None] * len(columns), *(p[c] for c in split)] for p in by_split]
    return save(figure, folder, "optimum", ["curve", *columns, *(f"split_{c}" for c in split)], rows)


def _point(name: str) -> dict[str, Any]:
    """A single marked point, out of the legend."""
    return series(name).kwargs(label="_nolegend_") | {"markersize": 8, "zorder": 5}


def _bandwidth(result: dict[str, Any], folder: Path) -> list[Path]:
    """Throughput over the link's rate: what adapting the threshold and the split is worth."""
    figure, (axes,) = new_figure(1, 1, width=6.4, height=3.8)
    points = result["curves"]["bandwidth"]
    x = _column(points, "egress_gbps")
    for name, key in (
        ("optimum", "optimum_rps"),
        ("best_threshold", "best_threshold_rps"),
        ("held", "held_rps"),
        ("naive", "naive_rps"),
        ("homogeneous", "homogeneous_rps"),
    ):
        if points[0][key] is not None:
            axes.plot(x, _column(points, key), **series(name).kwargs(markers=name != "homogeneous"))
    axes.set(
        xscale="log",
        ylim=(0, 1.15 * max(_column(points, "optimum_rps"))),
        xlabel="Link, Gbit/s",
        ylabel="Requests/s",
        title="A fixed threshold isn't safe on a link that varies"
        if _held_loses(points)
        else "Throughput over the link's rate",
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(loc="lower right")
    return save(figure, folder, "bandwidth", list(points[0]), [list(p.values()) for p in points])


def _held_loses(points: Sequence[dict[str, Any]]) -> bool:
    """Whether holding threshold and split somewhere yields less than the homogeneous cluster."""
    return any(p["homogeneous_rps"] is not None and p["held_rps"] < p["homogeneous_rps"] for p in points)


def _baselines(result: dict[str, Any], folder: Path) -> list[Path]:
    """The chain at equal hardware, ours beside what is published."""
    figure, (axes,) = new_figure(1, 1, width=5.6, height=3.4)
    printed = {
        row["system"]: row["published"] for row in result["published"] if row["figure"] == "throughput_rps"
    }
    bars = [
        ("collocated", result["collocated"], None),
        ("homogeneous", result["homogeneous"], printed.get("homogeneous")),
        ("naive", result["naive"], printed.get("naive")),
        ("prfaas", result, printed.get("prfaas_pd")),
    ]
    shown = [(name, one["throughput_rps"], other) for name, one, other in bars if one is not None]
    for i, (name, ours, other) in enumerate(shown):
        look = series("optimum" if name == "prfaas" else name)
        axes.bar(i, ours, width=0.6, color=look.colour)
        axes.text(i, ours * 0.93, f"{ours:.2f}", ha="center", va="top", color="#ffffff", fontweight="bold")
        if other is not None:
            label = "Published" if name == "prfaas" else "_nolegend_"
            axes.plot([i - 0.36, i + 0.36], [other, other], color="#000000", linewidth=1.4, label=label)
    labels = {"prfaas": "PrfaaS", **{n: series(n).label for n in ("collocated", "homogeneous", "naive")}}
    axes.set_xticks(range(len(shown)), [labels[name] for name, _, _ in shown])
    axes.grid(axis="x", visible=False)
    axes.set(ylabel="Requests/s", title="Highest throughput at equal hardware, by plan")
    axes.margins(y=0.15)
    if printed:
        axes.legend(loc="upper left")
    return save(figure, folder, "baselines", ["system", "throughput_rps", "published_rps"], shown)


def _queues(result: dict[str, Any], folder: Path) -> list[Path]:
    """TTFT with queues over the load."""
    rows = [row for row in result["queueing"] if "unstable" not in row]
    if not rows:
        return []
    figure, (axes,) = new_figure(1, 1)
    x = [100 * row["load"] for row in rows]
    for key, label, line in (
        ("ttft_mean_s", "Mean", "-"),
        ("ttft_p50_s", "P50", ":"),
        ("ttft_p90_s", "P90", "--"),
        ("ttft_p99_s", "P99", "-."),
    ):
        axes.plot(
            x, _column(rows, key), **series("ttft").kwargs(label=label) | {"linestyle": line, "markersize": 3}
        )
    axes.axhline(result["ttft_mean_s"], color="#000000", linewidth=0.8, label="Mean without queues")
    axes.set(
        xlabel="Load, % of the plan's throughput",
        ylabel="TTFT, s",
        title="TTFT with queues (M/G/k)",
        ylim=(0, 1.05 * max(_column(rows, "ttft_p99_s"))),
    )
    axes.legend(loc="upper left")
    keys = ["load", "rate_rps", "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s"]
    return save(figure, folder, "queues", keys, [[row[key] for key in keys] for row in rows])


def _sensitivity(result: dict[str, Any], folder: Path) -> list[Path]:
    """What a tenth or an instance more or less of each input does."""
    base = result["throughput_rps"]
    rows = result["sensitivity"]
    names = list(dict.fromkeys(row["input"] for row in rows))
    span = {n: [row for row in rows if row["input"] == n] for n in names}
    names.sort(key=lambda n: max(abs(row["throughput_rps"] - base) for row in span[n]))
    figure, (axes,) = new_figure(1, 1, width=6.4, height=0.26 * len(names) + 1.1)
    for y, name in enumerate(names):
        for row in span[name]:
            down = row["change"].startswith("-")
            gain = 100 * (row["throughput_rps"] / base - 1)
            axes.barh(
                y + (0.18 if down else -0.18),
                gain,
                height=0.34,
                color=series("held").colour if down else series("optimum").colour,
                label=("Less" if down else "More") if y == 0 else None,
            )
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", visible=False)
    axes.axvline(0, color="#000000", linewidth=0.8)
    axes.set(
        xlabel="Change of the best throughput, %",
        title="A tenth, or one instance, less and more of each input",
    )
    axes.legend(loc="lower right")
    return save(figure, folder, "sensitivity", list(rows[0]), [list(row.values()) for row in rows])


def _kv_table(result: dict[str, Any], folder: Path) -> list[Path]:
    """KV throughput over the length, dense models against hybrid ones."""
    figure, (axes,) = new_figure(1, 1, width=6.4, height=3.8)
    tokens = result["tokens"]
    for place, (name, row) in enumerate(result["kv_throughput_gbps"].items()):
        dense = result["kinds"][name] == "dense"
        axes.plot(tokens, row, **numbered(place, name).kwargs() | {"linestyle": "--" if dense else "-"})
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="Prompt, tokens",
        ylabel="KV made by an instance, Gbit/s",
        title="KV throughput while prefilling (dashed: dense models)",
    )
    axes.set_xticks(tokens, [f"{t / 1024:g}K" for t in tokens])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    rows = [[name, *row] for name, row in result["kv_throughput_gbps"].items()]
    return save(figure, folder, "kv_throughput", ["model", *(f"{t:g}" for t in tokens)], rows)


def _sites(result: dict[str, Any], folder: Path) -> list[Path]:
    """How full each link is, and what more of each resource is worth."""
    gains = sorted(((v, k) for k, v in result["worth"].items() if v > 1e-6))
    figure, (left, right) = new_figure(1, 2, height=0.24 * max(len(result["links"]), len(gains), 6) + 1.0)
    names = [f"{row['source']} → {row['target']}" for row in result["links"]]
    left.barh(names, [row["gbps"] for row in result["links"]], color="#dddddd", label="Link")
    left.barh(
        names,
        [row["used_gbps"] for row in result["links"]],
        color=series("link").colour,
        height=0.5,
        label="Used",
    )
    left.set(xlabel="Gbit/s", title="Links at the highest rate")
    left.grid(axis="y", visible=False)
    figure.legend(loc="outside lower left", ncols=2)
    right.barh([name for _, name in gains], [value for value, _ in gains], color=series("optimum").colour)
    right.set(xlabel="Requests/s", title="Worth of one instance or Gbit/s more")
    right.grid(axis="y", visible=False)
    rows = [
        ["link", f"{r['source']}>{r['target']}", r["gbps"], r["used_gbps"], None] for r in result["links"]
    ]
    rows += [["worth", name, None, None, value] for name, value in result["worth"].items()]
    return save(figure, folder, "sites", ["row", "name", "gbps", "used_gbps", "worth_rps"], rows)
