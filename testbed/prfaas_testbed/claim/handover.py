"""Piece `handover`: what prefill in another site adds to a first token, beside equal hardware in the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prfaas.config.experiment import Experiment
from prfaas.config.profile import find_profile
from prfaas.config.run import Run
from prfaas.config.topology import load_topology
from prfaas.figures import new_figure, save
from prfaas.model.errors import UsageError
from prfaas_testbed.claim import worlds
from prfaas_testbed.claim.gathering import by_hand, gathered, last_of_each
from prfaas_testbed.claim.judge import Goal, Piece, table
from prfaas_testbed.claim.runs import K_TOPOLOGIES

K_EXPERIMENT = "claim-handover"
K_COLD = 3  # requests that open the router's connections and don't count
K_TOKENS = 16  # of the model, that each of the profile's stands for
K_ALLOWED_S = 0.010  # beyond the round trip and the wire
K_PAYLOAD_SHARE = 1448 / 1514  # of a link's rate, Ethernet, IP and TCP headers taken off
K_GUIDE = ((8192, 0.81), (16384, 1.56))  # a published guide for another stack, at 41.5 ms: of the TTFT nearby


def measure(repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Raises UsageError: it takes a network."""
    raise by_hand("handover", K_EXPERIMENT)


def gather(folders: Sequence[Path], say: Callable[[str], None]) -> dict[str, Any]:
    """The record of the last run of each part. Raises UsageError."""
    found = last_of_each(gathered(folders, K_EXPERIMENT))
    missing = [part for part in ("near", "far") if part not in found]
    if missing:
        raise UsageError(f"{K_EXPERIMENT}: no run of the part {missing[0]}")
    rows = [row for part, one in found.items() for row in _rows(part, one.run, one.experiment)]
    record = {"rows": rows, **_link(found["far"].experiment)}
    for part in found:
        if part != "near":
            for one in _by_length(record, part, "testbed"):
                say(f"{part}: {one['tokens']} tokens: {1e3 * one['beyond_s']:+.1f} ms beyond RTT and wire")
    return {**record, "runs": [one.brief for one in found.values()]}


def _rows(part: str, run: Run, experiment: Experiment) -> list[dict[str, Any]]:
    requests = worlds.requests_of_testbed(experiment)
    rows = []
    for index, played in worlds.on_testbed(run, part):
        label = {"part": part, "world": "testbed", "repetition": index}
        rows.append({**label, "cores": worlds.costs(run, part, index), "requests_rows": played.plain()})
    simulated = worlds.simulated(experiment, requests)
    label = {"part": part, "world": "simulator", "repetition": 0}
    return [*rows, {**label, "requests_rows": simulated.plain()}]


def _link(experiment: Experiment) -> dict[str, Any]:
    """The round trip, and the wire time of the last piece of each length."""
    topology = load_topology(experiment.network, K_TOPOLOGIES / "networks")
    there, back = (topology.directed()[link] for link in ("east->west", "west->east"))
    profile = find_profile(experiment.models[0].profile or "", K_TOPOLOGIES)
    assert there.rate_mbps is not None  # the file says it
    rate_bps = there.rate_mbps * 1e6 * K_PAYLOAD_SHARE
    return {
        "rtt_s": (there.delay_ms + back.delay_ms) / 1e3,
        "chunk_tokens": profile.chunk_tokens,
        "bytes_per_token": profile.kv_bytes(profile.chunk_tokens) / profile.chunk_tokens,
        "rate_bps": rate_bps,
    }


def _wire_s(data: dict[str, Any], tokens: int) -> float:
    """What is sent when prefill has ended: the last chunk's KV."""
    last = tokens % data["chunk_tokens"] or data["chunk_tokens"]
    return float(last * data["bytes_per_token"] * 8 / data["rate_bps"])


def _ttfts(data: dict[str, Any], part: str, world: str) -> tuple[np.ndarray, np.ndarray]:
    """Prompt tokens and TTFT of every request that counts, repetitions one after the other."""
    chosen = [row for row in data["rows"] if row["part"] == part and row["world"] == world]
    if not chosen:
        return np.zeros(0), np.zeros(0)
    played = [worlds.Played.of_plain(row["requests_rows"]) for row in chosen]
    return (
        np.concatenate([one["prompt_tokens"][K_COLD:] for one in played]),
        np.concatenate([one["ttft_s"][K_COLD:] for one in played]),
    )


def _by_length(data: dict[str, Any], part: str, world: str) -> list[dict[str, float]]:
    """A row a prompt length: medians of TTFTs, and of what is beyond the round trip and the wire."""
    lengths, near = _ttfts(data, "near", world)
    _, far = _ttfts(data, part, world)
    count = min(len(near), len(far))
    lengths, near, far = lengths[:count], near[:count], far[:count]
    found = []
    for tokens in sorted(set(lengths.tolist())):
        here = (lengths == tokens) & ~np.isnan(near) & ~np.isnan(far)
        more = far[here] - near[here]
        beyond = more - data["rtt_s"] - _wire_s(data, int(tokens))
        found.append(
            {
                "tokens": tokens, "requests": int(here.sum()), "near_s": float(np.median(near[here])),
                "more_s": float(np.median(more)), "wire_s": _wire_s(data, int(tokens)),
                "beyond_s": float(np.median(beyond)), "beyond_p90_s": float(np.quantile(beyond, 0.9)),
            }
        )  # fmt: skip
    return found


def goals(data: dict[str, Any]) -> list[Goal]:
    """At most the round trip, the last piece's wire time and 10 ms, at every length."""
    found = _by_length(data, "far", "testbed")
    shown = ", ".join(f"{K_TOKENS * one['tokens'] / 1024:.0f}K {1e3 * one['beyond_s']:+.1f}" for one in found)
    return [
        Goal(
            "prefill 40 ms away adds at most one round trip, the wire time of the last piece and 10 ms",
            f"ms beyond round trip and wire, medians: {shown}",
            all(one["beyond_s"] <= K_ALLOWED_S for one in found),  # a length without an answer is NaN: missed
        )
    ]


def tell(data: dict[str, Any]) -> str:
    """A table by prompt length."""
    lines = []
    virtual = {one["tokens"]: one for one in _by_length(data, "far", "simulator")}
    bare = {one["tokens"]: one["near_s"] for one in _by_length(data, "near", "simulator")}
    busy = {one["tokens"]: one for one in _by_length(data, "far-busy", "testbed")}
    for one in _by_length(data, "far", "testbed"):
        full = busy.get(one["tokens"])
        lines.append(
            [
                f"{K_TOKENS * one['tokens'] / 1024:.0f}K", f"{one['requests']}", f"{1e3 * one['near_s']:.0f}",
                f"{1e3 * one['more_s']:.0f} ({one['more_s'] / one['near_s']:+.0%})",
                f"{1e3 * one['wire_s']:.0f}", f"{1e3 * one['beyond_s']:+.1f}",
                f"{1e3 * one['beyond_p90_s']:+.1f}",
                f"{1e3 * (one['near_s'] + one['beyond_s'] - bare[one['tokens']]):+.0f}",
                f"{1e3 * virtual[one['tokens']]['more_s']:.0f}",
                f"{1e3 * (full['more_s'] - one['more_s']):+.0f}" if full else "–",
            ]
        )  # fmt: skip
    head = [
        "prompt, tokens", "requests", "TTFT near, ms", "more when far, ms", "wire of the last piece",
        "beyond RTT and wire", "its P90", "beyond bare prefill, RTT and wire", "simulator: more",
        "a busy link adds, ms",
    ]  # fmt: skip
    guide = " and ".join(f"{share:+.0%} at {tokens // 1024}K" for tokens, share in K_GUIDE)
    return table(head, lines) + K_TOLD.format(rtt_ms=1e3 * data["rtt_s"], guide=guide)


K_TOLD = """
One request at a time through the router, {rtt_ms:.0f} ms and 10 Gbit/s away, rate and bytes divided by 100;
medians, the same prompts in the same order near and far; the first three, which open connections, are left
out. *Beyond bare prefill*: the same against the profile's own time, so that the handover inside the site, the
router and the instances' digests count as well. Busy: four CUBIC streams of others fill the link. A published
guide for another stack reports {guide} of the TTFT nearby at 41.5 ms, on a link whose rate it doesn't say.
Sixteen tokens are one here, so that prompts as JSON weigh on the divided link about what they do on the true
one. Sites have `tcp_slow_start_after_idle` at 0, as `prfaas doctor` asks: else a prompt's own way over takes
more round trips.
"""


def draw(data: dict[str, Any], folder: Path) -> list[str]:
    """What is added, over prompt length, with what may be."""
    figure, (panel,) = new_figure(1, 1, width=4.8, height=3.2)
    drawn: list[list[Any]] = []
    for part, world, label, colour in (
        ("far", "testbed", "idle link", "#0072B2"),
        ("far-busy", "testbed", "busy link", "#D55E00"),
        ("far", "simulator", "idle link, simulated", "#999999"),
    ):
        found = _by_length(data, part, world)
        if found:
            tokens = [K_TOKENS * one["tokens"] / 1024 for one in found]
            more_ms = [1e3 * one["more_s"] for one in found]
            panel.plot(tokens, more_ms, "o-", color=colour, label=label)
            drawn += [[part, world, a, round(b, 2)] for a, b in zip(tokens, more_ms, strict=True)]
    found = _by_length(data, "far", "testbed")
    allowed = [1e3 * (data["rtt_s"] + one["wire_s"] + K_ALLOWED_S) for one in found]
    panel.plot(
        [K_TOKENS * one["tokens"] / 1024 for one in found], allowed, "k--", label="round trip, wire and 10 ms"
    )
    panel.set_xscale("log", base=2)
    ticks = [K_TOKENS * one["tokens"] / 1024 for one in found]
    panel.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    panel.set(xlabel="Prompt, K tokens", ylabel="More TTFT than near, ms", ylim=(0, None))
    panel.legend(loc="lower left")
    paths = save(figure, folder, "handover", ["part", "world", "K tokens", "more TTFT, ms"], drawn)
    return [path.name for path in paths if path.suffix == ".png"]


PIECE = Piece("handover", "What 40 ms add to a first token", measure, goals, draw, tell, gather)
