"""Piece `baselines`: SGLang's stock `mooncake_tcp` and ours on the same link, with real servers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prfaas.config.run import Repetition
from prfaas.figures import new_figure, save
from prfaas_testbed.claim.faults import fate
from prfaas_testbed.claim.gathering import Gathered, by_hand, gathered
from prfaas_testbed.claim.judge import Goal, Piece, table
from prfaas_testbed.experiment.view import field, number

K_EXPERIMENT = "claim-baselines"
K_OURS, K_STOCK = "prfaas", "mooncake_tcp"
K_HEALTHY = "healthy"
K_ROLES = ("router", "pump", "prefill", "decode")
K_COLOURS = {K_OURS: "#0072B2", K_STOCK: "#D55E00"}


def measure(repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Raises UsageError: it takes a network and real servers."""
    raise by_hand("baselines", K_EXPERIMENT)


def gather(folders: Sequence[Path], say: Callable[[str], None]) -> dict[str, Any]:
    """A row a request; every run of a part is a further repetition of its rounds. Raises UsageError."""
    rows: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    parts = gathered(folders, K_EXPERIMENT)
    played: Counter[tuple[str, str]] = Counter()
    for one in parts:
        for repetition in one.run.repetitions:
            events = [row for row in repetition.events if one.view.ours(row) and row.event == "round"]
            for event in events:
                name = str(field(event, "round"))
                rows += [
                    {
                        "part": one.part, "fault": name, "repetition": played[one.part, name],
                        "sent_s": row.sent_s, "ttft_s": row.ttft_s, "e2e_s": row.e2e_s,
                        "prompt_tokens": row.prompt_tokens, "far": field(row, "transfer") == "wan",
                        "equal": row.tokens_equal, "error": row.error,
                    }
                    for row in repetition.requests if one.view.ours(row)
                ]  # fmt: skip
                costs.append(
                    {"part": one.part, "fault": name, "repetition": played[one.part, name],
                     **_cpu_s(repetition, one)}
                )  # fmt: skip
                played[one.part, name] += 1
    data = {"rows": rows, "costs": costs, "runs": [one.brief for one in parts]}
    for fault, part in _cells(data):
        median_s = np.median(_ttfts_s(data, part, fault) or [np.nan])
        say(f"{fault}, {part}: {dict(_fates(data, part, fault))}, median {median_s:.2f} s")
    return data


def further(before: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """Both as one record; the later rounds are further repetitions."""
    played = Counter((one["part"], one["fault"]) for one in before["costs"])
    found = {
        name: before[name]
        + [
            {**one, "repetition": one["repetition"] + played[one["part"], one["fault"]]}
            for one in fresh[name]
        ]
        for name in ("rows", "costs")
    }
    return {**found, "runs": before["runs"] + fresh["runs"]}


def _cpu_s(repetition: Repetition, one: Gathered) -> dict[str, float]:
    """CPU seconds of a round by role, of all its processes together; and resident bytes at its end."""
    found: dict[str, float] = {}
    for row in repetition.events:
        role = str(field(row, "role"))
        if row.event == "cost" and one.view.ours(row) and role in K_ROLES:
            found[role] = found.get(role, 0.0) + (number(row, "cpu_s") or 0.0)
            held = f"{role}_rss_bytes"
            found[held] = found.get(held, 0.0) + (number(row, "rss_bytes") or 0.0)
    return found


def _cells(data: dict[str, Any]) -> list[tuple[str, str]]:
    """(condition, engine), ours first."""
    faults = dict.fromkeys(row["fault"] for row in data["rows"])
    parts = {row["part"] for row in data["rows"]}
    return [(fault, part) for fault in faults for part in (K_OURS, K_STOCK) if part in parts]


def _rows(data: dict[str, Any], part: str, fault: str) -> list[dict[str, Any]]:
    return [row for row in data["rows"] if (row["part"], row["fault"]) == (part, fault)]


def _fates(data: dict[str, Any], part: str, fault: str) -> Counter[str]:
    return Counter(map(fate, _rows(data, part, fault)))


def _ttfts_s(data: dict[str, Any], part: str, fault: str) -> list[float]:
    """Of what was prefilled in the other site and answered rightly."""
    return [
        row["ttft_s"] for row in _rows(data, part, fault)
        if row["far"] and fate(row) == "equal" and row["ttft_s"] is not None
    ]  # fmt: skip


def goals(data: dict[str, Any]) -> list[Goal]:
    """Ours never fails where the stock engine answers, and isn't slower. What one of the two has not been
    asked is reached by neither."""
    conditions = list(dict.fromkeys(fault for fault, _ in _cells(data)))
    missing, slower = {}, {}
    for fault in conditions:
        ours, stock = (_fates(data, part, fault) for part in (K_OURS, K_STOCK))
        missing[fault] = (sum(ours.values()) - ours["equal"], sum(stock.values()) - stock["equal"])
        slower[fault] = _slower(*(_ttfts_s(data, part, fault) for part in (K_OURS, K_STOCK)))
    both = bool(conditions) and all(
        _rows(data, part, fault) for fault in conditions for part in (K_OURS, K_STOCK)
    )
    return [
        Goal(
            "on real servers, ours leaves no more requests without a right answer than mooncake_tcp",
            "; ".join(f"{fault}: {ours} against {stock}" for fault, (ours, stock) in missing.items()),
            both and all(ours <= stock for ours, stock in missing.values()),
        ),
        Goal(
            "its first tokens from the other site come no later than mooncake_tcp's (median)",
            "; ".join(f"{fault}: {text}" for fault, (text, _) in slower.items()),
            both and all(reached for _, reached in slower.values()),
        ),
    ]


def _slower(ours_s: list[float], stock_s: list[float]) -> tuple[str, bool]:
    """Of first tokens: what to say of ours beside the stock engine's, and whether they come no later."""
    if not ours_s or not stock_s:
        nobody = K_STOCK if ours_s else K_OURS
        return f"no right answer by {nobody}", bool(ours_s)
    ratio = float(np.median(ours_s) / np.median(stock_s))
    return f"{ratio:.2f} of its TTFT", ratio <= 1.0


def tell(data: dict[str, Any]) -> str:
    """A table of conditions and engines."""
    lines = []
    for fault, part in _cells(data):
        rows, fates, ttfts_s = (
            _rows(data, part, fault),
            _fates(data, part, fault),
            _ttfts_s(data, part, fault),
        )
        near_s = [row["ttft_s"] for row in rows if not row["far"] and fate(row) == "equal"]
        shown = [f"{np.quantile(ttfts_s, q):.2f}" if ttfts_s else "–" for q in (0.5, 0.9)]
        lines.append(
            [
                f"{fault}, {part}", f"{len({row['repetition'] for row in rows})}", f"{len(rows)}",
                *(f"{fates[name]}" for name in ("equal", "refused", "wrong", "lost")),
                f"{sum(row['far'] for row in rows)}", *shown,
                f"{np.median(near_s):.2f}" if near_s else "–",
            ]
        )  # fmt: skip
    head = [
        "link, engine", "times", "requests", "equal", "refused", "wrong", "lost", "prefilled far",
        "their TTFT P50, s", "P90", "near: P50",
    ]  # fmt: skip
    once = max(one["repetition"] for one in data["costs"]) == 0
    return table(head, lines) + "\n" + _costs(data) + K_TOLD + (K_ONCE if once else "")


def _costs(data: dict[str, Any]) -> str:
    """CPU a request and memory, by engine and role, on the healthy link."""
    lines = []
    for part in (K_OURS, K_STOCK):
        rounds = [one for one in data["costs"] if one["part"] == part and one["fault"] == K_HEALTHY]
        requests = len(_rows(data, part, K_HEALTHY))
        if rounds and requests:
            each = [1e3 * sum(one.get(role, 0.0) for one in rounds) / requests for role in K_ROLES]
            held = [float(np.mean([one.get(f"{role}_rss_bytes", 0.0) for one in rounds])) for role in K_ROLES]
            lines.append([part, *(f"{ms:.0f}" for ms in each), *(f"{size / 2**20:.0f}" for size in held)])
    head = ["CPU ms a request, healthy", "router", "pumps", "prefill", "decode"]
    return table([*head, *(f"{role}, MiB" for role in head[1:])], lines)


K_TOLD = """
Real SGLang servers on CPU with the dense test model: prefill in both sites, decode, the router and the plain
server in west; 40 ms, 200 Mbit/s and 0.1% loss. The router has the report's policy with a threshold of 1,024
tokens; 1.5 requests a second of 256 to 4,096 tokens for 20 s, the same for both engines. *Wrong*: a whole
answer whose tokens differ from the plain server's. *Lost*: neither an answer nor an error within 60 s, or a
connection that just ended. Ours has mutual TLS and checks every piece; mooncake_tcp has neither. KV of a test
model is small (1 KiB a token): that of a prompt that goes far fills the link for 0.04 to 0.17 s. CPU: of all
processes of a role together, from before the first request until nothing is held; a real server's idle loop
is in it. Memory: resident, shared libraries counted with each process.
"""
K_ONCE = """\
Each engine ran once on each link: there are no intervals, and one run doesn't tell what the next would be.
*Healthy* is the link with its 0.1% loss; it wasn't tried without.
"""


def draw(data: dict[str, Any], folder: Path) -> list[str]:
    """First tokens of what was prefilled in the other site, as shares."""
    conditions = list(dict.fromkeys(fault for fault, _ in _cells(data)))
    figure, axes = new_figure(1, len(conditions), width=3.2, height=2.8, sharey=True)
    drawn: list[list[Any]] = []
    for fault, panel in zip(conditions, axes, strict=True):
        for part in (K_OURS, K_STOCK):
            rows = [row for row in _rows(data, part, fault) if row["far"]]
            ttfts_s = sorted(_ttfts_s(data, part, fault))
            if rows:
                # Of all that were sent there: what has no right answer never comes.
                share = np.arange(1, len(ttfts_s) + 1) / len(rows)
                panel.step(ttfts_s, share, where="post", color=K_COLOURS[part], label=part)
                drawn += [
                    [fault, part, round(a, 4), round(float(b), 4)]
                    for a, b in zip(ttfts_s, share, strict=True)
                ]
        panel.set(title=fault, xlabel="TTFT, s", xlim=(0, None), ylim=(0, 1.02))
    axes[0].set_ylabel("share of requests")
    axes[0].legend(loc="lower right")
    paths = save(figure, folder, "baselines", ["condition", "engine", "TTFT, s", "share"], drawn)
    return [path.name for path in paths if path.suffix == ".png"]


PIECE = Piece(
    "baselines", "Beside SGLang's mooncake_tcp, on real servers", measure, goals, draw, tell, gather,
    further=further,
)  # fmt: skip
