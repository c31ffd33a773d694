"""What `prfaas plan` prints for people, from the same mapping that --json writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

K_ROWS = (
    ("throughput", "throughput_rps", "req/s"),
    ("threshold", "threshold_tokens", "tokens"),
    ("prefill instances", "prefill", ""),
    ("decode instances", "decode", ""),
    ("offloaded share", "offloaded_share", ""),
    ("mean long prompt", "l_long_tokens", "tokens"),
    ("mean short prompt", "l_short_tokens", "tokens"),
    ("PrfaaS prefill", "prfaas_rps", "req/s"),
    ("local prefill", "local_prefill_rps", "req/s"),
    ("decode", "decode_rps", "req/s"),
    ("egress", "egress_gbps", "Gbit/s"),
    ("TTFT mean, no queue", "ttft_mean_s", "s"),
    ("TTFT P90, no queue", "ttft_p90_s", "s"),
    ("limited by", "limited_by", ""),
)
K_LOADS = (0.5, 0.75, 0.9)  # the JSON has more


def number(value: object, digits: int = 4) -> str:
    """Four significant digits; whole numbers as they are; a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 10**digits and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def table(rows: Iterable[Sequence[str]], indent: str = "  ") -> str:
    """Columns, the first to the left, the others to the right; a last column of words to the left."""
    listed = [list(row) for row in rows]
    if not listed:
        return ""
    widths = [max(len(row[i]) for row in listed if i < len(row)) for i in range(max(map(len, listed)))]
    lines = []
    for row in listed:
        cells = [
            cell.ljust(widths[i]) if i == 0 or i >= 6 else cell.rjust(widths[i]) for i, cell in enumerate(row)
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines) + "\n"


def plan_text(result: dict[str, Any]) -> str:
    """One PrfaaS and one local cluster."""
    return "".join(
        (
            "Plan and baselines at equal hardware\n",
            _systems(result),
            _baselines(result),
            _provenance(result),
            _published(result["published"]),
            "\nTTFT with queues (M/G/k), threshold and split as above\n",
            _queues(result["queueing"]),
            "\nThe least link that carries\n",
            _links(result["link_needed"]),
            _cost(result["cost"]),
            _sizing(result["sizing"]) if result["sizing"] else "",
            "\nKV throughput of one PrfaaS instance, and egress of clusters of them, Gbit/s\n",
            _kv_throughput(result["kv_throughput"]),
            "\nSensitivity of the throughput to each input\n",
            _sensitivity(result["sensitivity"]),
        )
    )


def _systems(result: dict[str, Any]) -> str:
    systems = [("PrfaaS", result), ("homogeneous", result["homogeneous"]), ("naive", result["naive"])]
    shown = [(name, one) for name, one in systems if one is not None]
    rows = [["", *(name for name, _ in shown), ""]]
    for label, key, unit in K_ROWS:
        rows.append([label, *(number(one[key]) for _, one in shown), unit])
    return table(rows)


def _provenance(result: dict[str, Any]) -> str:
    """Which figures aren't what the case says alone."""
    lines = [f"  extrapolated: {line}\n" for line in result["extrapolated"]]
    if result["solved_back"]:
        lines.append(f"  solved back, not published: {', '.join(result['solved_back'])}\n")
    return "".join(lines)


def _published(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [["system", "figure", "published", "ours", "ratio", ""]]
    for row in rows:
        figures = (number(row["published"]), number(row["ours"]), number(row["ratio"], 3))
        how = "circular" if row["circular"] else ""
        lines.append([row["system"], row["figure"], *figures, how, row["note"]])
    return "\nPublished figures beside ours\n" + table(lines)


def _links(rows: list[dict[str, Any]]) -> str:
    lines = [["", "req/s", "Gbit/s", "threshold", "prefill"]]
    for row in rows:
        egress = "none is enough" if row["egress_bps"] is None else number(row["egress_bps"] / 1e9)
        split = (number(row.get("threshold_tokens")), number(row.get("prefill")))
        lines.append([row["for"], number(row["rate_rps"]), egress, *split])
    return table(lines)


def _kv_throughput(rows: list[dict[str, Any]]) -> str:
    clusters = list(rows[0]["egress_gbps"])
    lines = [["tokens", "instance", *(f"{gpus} GPUs" for gpus in clusters)]]
    for row in rows:
        egress = (number(row["egress_gbps"][gpus]) for gpus in clusters)
        lines.append([number(row["tokens"]), number(row["kv_throughput_gbps"]), *egress])
    return table(lines)


def _sensitivity(rows: list[dict[str, Any]]) -> str:
    lines = [["input", "change", "plan anew", "plan held", "elasticity"]]
    for row in rows:
        rates = (number(row["throughput_rps"]), number(row["held_rps"]))
        elasticity = "-" if row["elasticity"] is None else f"{row['elasticity']:+.2f}"
        lines.append([row["input"], row["change"], *rates, elasticity])
    return table(lines)


def _baselines(result: dict[str, Any]) -> str:
    lines = []
    one = result["collocated"]
    if one:
        lines.append(
            f"  collocated, {one['instances']} instances: {number(one['throughput_rps'])} req/s with decode "
            f"at most {one['decode_slowdown']:g} x slower; {number(one['no_interference_rps'])} if prefill "
            "slowed nothing"
        )
    for name, ratio in result["ratios"].items():
        if ratio is not None:
            lines.append(f"  PrfaaS over {name}: {ratio:.3f}")
    return "\n".join(lines) + "\n" if lines else ""


def _queues(rows: list[dict[str, Any]]) -> str:
    lines = [["load", "req/s", "mean s", "P50 s", "P90 s", "P99 s"]]
    for row in rows:
        if row["load"] not in K_LOADS:
            continue
        head = [f"{row['load']:.0%}", number(row["rate_rps"])]
        if "unstable" in row:
            lines.append([*head, "-", "-", "-", "-", row["unstable"]])
        else:
            keys = ("ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s")
            lines.append([*head, *(number(row[key], 3) for key in keys)])
    return table(lines)


def _cost(cost: dict[str, Any]) -> str:
    # Per thousand requests: a single one costs too little to read.
    rows = [
        [name, number(None if cost[name] is None else 1000 * cost[name])]
        for name in ("prfaas", "homogeneous", "naive")
    ]
    return f"\nCost of 1,000 requests at full throughput, {cost['unit']}\n" + table(rows)


def _sizing(sizing: dict[str, Any]) -> str:
    slo = sizing["slo"]
    return (
        f"\nInstances for {sizing['rate_rps']:g} req/s with a TTFT of at most {slo['ttft_s']:g} s for "
        f"{slo['quantile']:.0%} of requests\n"
        + table(
            [
                ["PrfaaS", number(sizing["prfaas_instances"])],
                ["local prefill", number(sizing["prefill"])],
                ["local decode", number(sizing["decode"])],
                ["threshold", number(sizing["threshold_tokens"]), "tokens"],
                ["link, used", number(sizing["egress_bps"] / 1e9), "Gbit/s"],
                [f"TTFT P{slo['quantile'] * 100:g}", number(sizing["ttft_quantile_s"], 3), "s"],
                ["cost an hour", number(sizing["cost_per_hour"]), sizing["unit"]],
            ]
        )
    )


def sites_text(result: dict[str, Any]) -> str:
    """Several clusters."""
    parts = [f"Highest rate of the whole: {number(result['throughput_rps'])} req/s\n\nLocal clusters\n"]
    rows = [["", "req/s", "prefill", "decode", "offloaded", "threshold", "to"]]
    for one in result["local"]:
        to = ", ".join(f"{name} {share:.1%}" for name, share in one["to"].items() if share > 5e-4) or "-"
        rows.append(
            [
                one["name"],
                number(one["rate_rps"]),
                number(one["prefill"]),
                number(one["decode"]),
                f"{one['offloaded_share']:.1%}",
                number(one["threshold_tokens"]),
                to,
            ]
        )
    parts.append(table(rows))
    parts.append("\nLinks, Gbit/s\n")
    parts.append(
        table(
            [
                ["", "used", "of"],
                *(
                    [
                        f"{row['source']} > {row['target']}",
                        number(row["used_gbps"], 3),
                        number(row["gbps"], 3),
                    ]
                    for row in result["links"]
                ),
            ]
        )
    )
    parts.append("\nPrefill utilisation of PrfaaS clusters\n")
    parts.append(table([[name, f"{share:.0%}"] for name, share in result["prfaas_utilisation"].items()]))
    gains = sorted(((v, k) for k, v in result["worth"].items() if v > 1e-6), reverse=True)
    parts.append("\nWhat one more would add, req/s (an instance, or a Gbit/s of link), roles held\n")
    parts.append(
        table([[name, number(value, 3)] for value, name in gains]) or "  nothing alone adds anything\n"
    )
    return "".join(parts)


def table_text(result: dict[str, Any]) -> str:
    """A table of models."""
    head = ["", *(f"{tokens / 1024:g}K" for tokens in result["tokens"])]
    parts = ["KV throughput of one instance while prefilling, Gbit/s\n"]
    parts.append(
        table([head, *([name, *map(number, row)] for name, row in result["kv_throughput_gbps"].items())])
    )
    for gpus, by_model in result["egress_gbps"].items():
        parts.append(f"\nEgress of {int(gpus):,} GPUs ({result['gpus_per_instance']} an instance), Gbit/s\n")
        parts.append(table([head, *([name, *map(number, row)] for name, row in by_model.items())]))
    if result["published"]:
        parts.append("\nPublished cluster figures beside ours, Gbit/s\n")
        rows = [["", "GPUs", "tokens", "published", "ours", "ratio"]]
        for row in result["published"]:
            printed = ("under " if row["below"] else "") + number(row["published_gbps"])
            rows.append(
                [
                    row["model"],
                    number(row["gpus"]),
                    number(row["tokens"]),
                    printed,
                    number(row["ours_gbps"]),
                    number(row["ratio"], 3),
                ]
            )
        parts.append(table(rows))
    return "".join(parts)
