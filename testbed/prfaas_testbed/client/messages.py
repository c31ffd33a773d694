"""What the runner tells the load generator, and what it hears back: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec


@dataclass(frozen=True)
class Target:
    """A server that gets the request's body."""

    url: str
    answers: bool
    """Its stream is the client's answer; the others' answers are only awaited."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields added to the body for this target alone."""


@dataclass(frozen=True)
class Shot:
    """One request, to be sent at its time whatever became of those before it."""

    id: str
    at_s: float
    """After the load's start."""
    body: dict[str, Any]
    targets: tuple[Target, ...]
    timeout_s: float
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Answer:
    """What became of one shot. Times are seconds after the load's start, or durations from `sent_s`."""

    id: str
    sent_s: float
    ttft_s: float | None = None
    e2e_s: float | None = None
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text_bytes: int = 0
    cached_tokens: int | None = None
    decode_cached_tokens: int | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    """The answer's headers that begin with x-prfaas-."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The final chunk's meta_info, without the logprobs."""
    error: str | None = None


def write_shots(path: Path, shots: Iterable[Shot]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for shot in shots:
            # Not asdict of the whole: it copies prompts of 100,000 tokens one by one.
            row = {**vars(shot), "targets": [asdict(target) for target in shot.targets]}
            file.write(json.dumps(row, separators=(",", ":")) + "\n")


def read_shots(path: Path) -> list[Shot]:
    shots = []
    for line in path.read_bytes().splitlines():
        row = msgspec.json.decode(line)
        row["targets"] = tuple(Target(**target) for target in row["targets"])
        shots.append(Shot(**row))
    return shots


def to_line(answer: Answer) -> str:
    return json.dumps(asdict(answer), separators=(",", ":")) + "\n"


def read_answers(path: Path) -> Iterator[Answer]:
    """The whole lines of the file: a last one that was cut off is left out."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    for line in text[: text.rfind("\n") + 1].splitlines():
        yield Answer(**json.loads(line))
