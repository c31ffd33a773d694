"""What the bench promises, judged from its rows. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from prfaas_testbed.bench.harness import Row, median, summary

K_TO_IPERF3 = 0.95  # of the best iperf3 over its stream counts, on a WAN
K_TO_MOONCAKE = 1.0
K_TO_MOONCAKE_LOSSY = 3.0  # at 1% random loss or more, where only CUBIC may be used
K_LOSSY = 0.01
K_CONTIGUOUS_TO_IPERF3 = 0.9  # pump to pump over loopback, at equal streams
K_TLS_TO_PLAIN = 0.5
K_SMALL_TO_LARGE = 1 / 3  # 4 KiB segments beside 64 KiB ones
K_LOOP_ADDED_MS = 1.0  # to the 99th percentile of a busy loop in the host process
K_COMPLETION = 1.05  # of one RTT and the bytes' own time
K_SEGMENTS_IN_ONE_CALL = 100_000


def judge_wan(rows: Iterable[Row]) -> list[Row]:
    """Two checks a cell: against the best iperf3 and against Mooncake; what was measured with TLS too has one
    against the same link without.
    """
    all_rows = list(rows)
    found = [row for row in all_rows if not row.get("tls")]
    ours = {row["cell"]: row for row in all_rows if row["engine"] == "prfaas"}
    checks = []
    for cell in summary(found):
        mine = next(row for row in found if row["cell"] == cell["cell"])
        lossy = (
            mine["loss"] >= K_LOSSY and mine["burst_packets"] <= 1 and mine["congestion_control"] == "cubic"
        )
        mooncake = K_TO_MOONCAKE_LOSSY if lossy else K_TO_MOONCAKE
        checks.append(at_least(f"wan/{cell['cell']}/to_best_iperf3", cell["to_best_iperf3"], K_TO_IPERF3))
        checks.append(at_least(f"wan/{cell['cell']}/to_mooncake", cell["to_mooncake"], mooncake))
        encrypted, plain = ours.get(with_tls(cell["cell"])), cell["prfaas_mbps"]
        secure = middle(encrypted) if encrypted else None
        if secure and plain:
            checks.append(at_least(f"wan/{cell['cell']}/tls_to_plain", secure / plain, K_TLS_TO_PLAIN))
    return checks


def with_tls(cell: str) -> str:
    """The name of a cell's measurement with mutual TLS."""
    return f"{cell}-tls"


def judge_loopback(rows: Iterable[Row]) -> list[Row]:
    """Contiguous to iperf3, scattered to Mooncake, TLS to plain, small segments to large ones."""
    by_name = {(row["cell"], row["engine"]): middle(row) for row in rows}

    def ratio(ours: str, theirs: str, engine: str) -> float | None:
        mine, other = by_name.get((ours, "prfaas")), by_name.get((theirs, engine))
        return mine / other if mine and other else None

    return [
        at_least(
            "loopback/contiguous/to_iperf3_at_equal_streams",
            ratio("loopback-contiguous", "loopback-contiguous", "iperf3"),
            K_CONTIGUOUS_TO_IPERF3,
        ),
        at_least(
            "loopback/scattered-64k/to_mooncake",
            ratio("loopback-64k", "loopback-64k", "mooncake"),
            K_TO_MOONCAKE,
        ),
        at_least(
            "loopback/tls/to_plain", ratio("loopback-64k-tls", "loopback-64k", "prfaas"), K_TLS_TO_PLAIN
        ),
        at_least("loopback/4k/to_64k", ratio("loopback-4k", "loopback-64k", "prfaas"), K_SMALL_TO_LARGE),
    ]


def at_least(name: str, value: float | None, least: float) -> Row:
    return _check(name, value, f"at least {least:.4g}", value is not None and value >= least)


def at_most(name: str, value: float | None, most: float) -> Row:
    return _check(name, value, f"at most {most:.4g}", value is not None and value <= most)


def middle(row: Row) -> float | None:
    values: Sequence[float] = row["goodput_mbps"]
    return median(values) if values else None


def _check(name: str, value: float | None, wanted: str, passed: bool) -> dict[str, Any]:
    check: dict[str, Any] = {
        "name": name,
        "outcome": "passed" if passed else "failed",
        "value": None if value is None else round(value, 4),
        "wanted": wanted,
    }
    if value is None:
        check["reason"] = "not measured"
    return check
