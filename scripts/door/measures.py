"""What is measured: latency, open streams, memory and tokenising, each as one object."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import uvloop
from load import Load, Pool, quantile
from stage import Stage, Watch, say


def latency(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds alternate between all ways, so that a busy spell of the machine meets them all."""
    stage = Stage(args.tokens, args.beside, work_s=args.work_ms / 1e3)
    counted: dict[str, dict[str, float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    try:
        stage.settle()
        ways = {"direct": [stage.decode, stage.prefill]} | {k: [v] for k, v in stage.ports.items()}
        for name in ways:
            rows[name] = {
                "ttft_s": [],
                "errors": [],
                "cpu_s_per_request": [],
                "raw_ttft_ms": [],
                "beside": [],
            }
        for name in own_names(ways):
            uvloop.run(Load(50, 0).run(ways[name], 2))
        for number in range(args.rounds):
            # There and back again, so that nothing always comes after the same.
            for name, ports in list(ways.items())[:: -1 if number % 2 else 1]:
                watch = Watch()
                before = stage.cpu_s(name) if name in stage.processes else 0.0
                ttfts, errors = uvloop.run(Load(args.rate, number).run(ports, args.seconds))
                row = rows[name]
                row["ttft_s"].append([quantile(ttfts, share) for share in (0.5, 0.9, 0.99)])
                row["raw_ttft_ms"].append([round(ttft * 1e3, 3) for ttft in ttfts])
                row["errors"].append(len(errors))
                row["beside"].append(watch.seen())
                if name in stage.processes:
                    row["cpu_s_per_request"].append((stage.cpu_s(name) - before) / max(1, len(ttfts)))
                say(
                    f"round {number} {name}: {len(ttfts)} answered, {len(errors)} errors, p50/p90/p99 "
                    + "/".join(f"{value * 1e3:.2f}" for value in row["ttft_s"][-1])
                    + " ms"
                    + (f", {row['cpu_s_per_request'][-1] * 1e3:.2f} ms CPU each" if name != "direct" else "")
                    + f"; others took {row['beside'][-1]['others_cpus']:.2f} processors"
                )
                if errors:
                    say(f"  first error: {errors[0][:300]}")
        counted = {name: stage.counted(name) for name in own_names(ways)}
    finally:
        stage.close()
    for name, row in rows.items():
        if name != "direct":
            row["added_ms"] = [
                [(one - other) * 1e3 for one, other in zip(mine, direct, strict=True)]
                for mine, direct in zip(row["ttft_s"], rows["direct"]["ttft_s"], strict=True)
            ]
            row["added_p99_of_all_ms"] = p99_of_all(row) - p99_of_all(rows["direct"])
    return {
        "rate_rps": args.rate,
        "seconds": args.seconds,
        "tokens": args.tokens,
        "work_ms": args.work_ms,
        "quantiles": [0.5, 0.9, 0.99],
        "load_average": os.getloadavg()[0],
        "ways": rows,
        "counted": counted,
    }


def own_names(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith("prfaas")]


def p99_of_all(row: dict[str, Any]) -> float:
    return quantile([ttft for round_ in row["raw_ttft_ms"] for ttft in round_], 0.99)


def streams(args: argparse.Namespace) -> dict[str, Any]:
    """So many streams open at once: all answered whole?"""
    stage = Stage(args.tokens, args.beside, step_s=args.step_s)
    out = {}
    try:
        for name, port in stage.ports.items():

            async def main(port: int = port) -> tuple[list[float], list[str]]:
                load, ttfts, errors = Load(1, 1), [], []
                pool = Pool(port)
                gap = asyncio.Semaphore(100)  # connections being opened at once

                async def one(place: int) -> None:
                    await asyncio.sleep(place / args.streams * 10)
                    async with gap:
                        pool.free.append(await pool.get())
                    await load.one([pool], ttfts, errors)

                await asyncio.gather(*(one(place) for place in range(args.streams)))
                return ttfts, errors

            before = stage.rss_mib(name)
            ttfts, errors = uvloop.run(main())
            out[name] = {
                "answered": len(ttfts),
                "errors": errors[:3],
                "rss_mib": [before, stage.rss_mib(name)],
                "ttft_p99_s": quantile(ttfts, 0.99),
            }
            say(f"{name}: {out[name]}")
    finally:
        stage.close()
    return {"streams": args.streams, "tokens": args.tokens, "ways": out}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Resident memory after each tenth of the requests, closed loop of 32."""
    stage = Stage(1, [])
    rss = []
    try:
        errors: list[str] = []

        async def tenth(count: int) -> None:
            load, pool = Load(1, count), Pool(stage.router)

            async def worker(mine: int) -> None:
                for _ in range(mine):
                    await load.one([pool], [], errors)

            await asyncio.gather(*(worker(count // 32) for _ in range(32)))

        began = time.monotonic()
        for _ in range(10):
            uvloop.run(tenth(args.requests // 10))
            rss.append(stage.rss_mib("prfaas"))
            say(f"{rss[-1]:.1f} MiB after {time.monotonic() - began:.0f} s, {len(errors)} errors")
    finally:
        stage.close()
    return {"requests": args.requests, "errors": len(errors), "rss_mib": rss}


def tokenise(folder: str) -> dict[str, Any]:
    from prfaas.config.router import Model
    from prfaas.router.body import Endpoint, read_body
    from prfaas.router.tokens import PromptReader
    from prfaas.routing import block_hashes

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    reader = PromptReader(Model(name="m", tokenizer=folder))
    rows = []
    for words in (100, 1000, 10000, 100000):
        rng = random.Random(words)
        text = " ".join(f"word{rng.randrange(170)}" for _ in range(words))
        raw = json.dumps({"prompt": text}).encode()
        best, parse = float("inf"), float("inf")
        for _ in range(5):
            began = time.perf_counter()
            asked = read_body(Endpoint.COMPLETIONS, raw)
            parse = min(parse, time.perf_counter() - began)
            prompt = reader.read(asked)
            best = min(best, time.perf_counter() - began)
        began = time.perf_counter()
        block_hashes(prompt.ids, 64)
        hashing = time.perf_counter() - began
        scale = 1e6 / prompt.tokens
        rows.append(
            {
                "tokens": prompt.tokens,
                "ms_per_1k_tokens": best * scale,
                "of_which_json": parse * scale,
                "hashing_64_ms_per_1k_tokens": hashing * scale,
            }
        )
    return {"folder": Path(folder).name, "rows": rows}
