"""Recorded traces: lines to rows, rows to timed requests. Reading the file is the caller's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from random import Random

from prfaas.config.workload import K_MOONCAKE_BLOCK_TOKENS, Azure, Mooncake
from prfaas.model.errors import ConfigError

K_AZURE_BLOCK_TOKENS = 64  # the trace has no prefixes: any will do


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One line of a trace, checked."""

    at_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


def parse_mooncake(lines: Sequence[str], file: str) -> list[TraceRow]:
    """Mooncake's JSON lines. hash_ids name the prompt's blocks of 512 tokens, the last one partial; ids stand
    for a block with all before it. Raises ConfigError with line and field."""
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError:
            raise ConfigError(file, f"line {number}", line[:60], "expected a JSON object") from None
        if not isinstance(data, dict):
            raise ConfigError(file, f"line {number}", line[:60], "expected a JSON object")
        at_ms = _number(data, "timestamp", 0, file, number)
        tokens = int(_number(data, "input_length", 1, file, number))
        output = int(_number(data, "output_length", 0, file, number))
        ids = data.get("hash_ids", [])
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise ConfigError(file, f"line {number}: hash_ids", ids, "expected a list of whole numbers")
        need = math.ceil(tokens / K_MOONCAKE_BLOCK_TOKENS)
        if ids and len(ids) != need:
            raise ConfigError(
                file,
                f"line {number}: hash_ids",
                f"{len(ids)} ids",
                f"{tokens} tokens are {need} blocks of {K_MOONCAKE_BLOCK_TOKENS}",
            )
        rows.append(TraceRow(at_ms / 1000.0, tokens, max(output, 1), tuple(ids)))
    return _not_empty(rows, file)


def _number(data: dict[str, object], name: str, least: float, file: str, line: int) -> float:
    value = data.get(name)
    if type(value) not in (int, float) or not least <= value < math.inf:  # type: ignore[operator]
        raise ConfigError(file, f"line {line}: {name}", value, f"expected a number of at least {least:g}")
    return float(value)  # type: ignore[arg-type]


def parse_azure(lines: Sequence[str], file: str) -> list[TraceRow]:
    """Azure's CSV: TIMESTAMP, ContextTokens, GeneratedTokens under a header. Raises ConfigError."""
    header = [name.strip() for name in lines[0].split(",")] if lines else []
    wanted = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
    if header != wanted:
        raise ConfigError(file, "line 1", lines[0][:60] if lines else "", f"expected {','.join(wanted)}")
    rows: list[TraceRow] = []
    first: datetime | None = None
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        fields = line.split(",")
        if len(fields) != 3:
            raise ConfigError(file, f"line {number}", line[:60], "expected 3 fields")
        try:
            at = _azure_time(fields[0].strip())
        except ValueError:
            raise ConfigError(
                file, f"line {number}: TIMESTAMP", fields[0], "expected YYYY-MM-DD HH:MM:SS.f"
            ) from None
        counts = []
        for name, text in zip(wanted[1:], fields[1:], strict=True):
            if not text.strip().isdecimal():
                raise ConfigError(file, f"line {number}: {name}", text, "expected a whole number")
            counts.append(int(text))
        first = first or at
        rows.append(TraceRow((at - first).total_seconds(), max(counts[0], 1), max(counts[1], 1)))
    return _not_empty(rows, file)


def _azure_time(text: str) -> datetime:
    """Azure writes seven decimals, a datetime holds six."""
    whole, dot, decimals = text.partition(".")
    return datetime.fromisoformat(whole + dot + decimals[:6])


def _not_empty(rows: list[TraceRow], file: str) -> list[TraceRow]:
    if not rows:
        raise ConfigError(file, "the file", "no request", "a trace needs at least one line")
    return rows


def parse_trace(config: Mooncake | Azure, lines: Sequence[str]) -> list[TraceRow]:
    """The rows of the trace that `config` names. Raises ConfigError."""
    parse = parse_mooncake if isinstance(config, Mooncake) else parse_azure
    return parse(lines, config.file)


@dataclass(frozen=True, slots=True)
class PlayedRow:
    """A row at the time it is played, with lengths after division and cuts."""

    at_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]
    block_tokens: int


def play(config: Mooncake | Azure, rows: Sequence[TraceRow], rng: Random) -> Iterator[PlayedRow]:
    """Rows in order of arrival: spread, cut to the window, scaled in rate and length, repeated."""
    timed = _spread(rows, config.bucket_s, rng) if isinstance(config, Mooncake) else list(rows)
    timed = [row for row in timed if row.at_s >= config.start_s]
    if not timed:
        raise ConfigError(config.file, "start_s", config.start_s, "nothing of the trace is left after it")
    timed.sort(key=lambda row: row.at_s)
    # A round lasts its span and one mean gap, so that rounds join at the trace's own rate.
    span_s = timed[-1].at_s - config.start_s
    round_s = span_s * (len(timed) + 1) / len(timed) if span_s > 0 else 0.0
    scale = config.rate_scale or 1.0
    if config.rate_rps is not None:
        if not round_s > 0:
            raise ConfigError(
                config.file, "rate_rps", config.rate_rps, "the trace's arrivals are all at once"
            )
        scale = config.rate_rps * round_s / len(timed)
    # One more than the greatest id, so that the next round's ids are new.
    ids = 1 + max((max(row.hash_ids) for row in timed if row.hash_ids), default=0)
    block_tokens = config.block_tokens if isinstance(config, Mooncake) else K_AZURE_BLOCK_TOKENS
    for turn in range(config.repeat):
        for row in timed:
            tokens = _shorter(row.input_tokens, config.length_divisor, config.max_input_tokens)
            if turn:
                hash_ids = tuple(i + turn * ids for i in row.hash_ids)
            else:
                hash_ids = row.hash_ids
            yield PlayedRow(
                at_s=(row.at_s - config.start_s + turn * round_s) / scale,
                input_tokens=tokens,
                output_tokens=_shorter(row.output_tokens, config.length_divisor, config.max_output_tokens),
                block_ids=hash_ids[: math.ceil(tokens / block_tokens)],
                block_tokens=block_tokens,
            )


def _shorter(tokens: int, divisor: float, most: int | None) -> int:
    shorter = max(1, math.ceil(tokens / divisor))
    return shorter if most is None else min(shorter, most)


def _spread(rows: Sequence[TraceRow], bucket_s: float, rng: Random) -> list[TraceRow]:
    """Arrivals that the trace rounds to buckets, spread evenly at random over their bucket."""
    if not bucket_s:
        return list(rows)
    return [
        TraceRow(
            (round(row.at_s / bucket_s) + rng.random()) * bucket_s,
            row.input_tokens,
            row.output_tokens,
            row.hash_ids,
        )
        for row in rows
    ]
