"""run.json: the one record of a run; testbed and simulator write it, figures, checks and reports read it.

Rows are open maps so that a writer can add raw values; every reader may rely on the named fields.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prfaas.config.loading import first_fault
from prfaas.model.errors import UsageError

K_RUN_FILE = "run.json"
K_INLINE_BYTES = 20_000_000  # beyond this, raw rows go to files beside run.json
K_OUTSIDE = ("repetitions", "baseline", "void")
K_STAMP = "%Y%m%dT%H%M%SZ"
K_NAME_DIGITS = 12

Outcome = Literal["passed", "failed", "unsupported"]


class Row(BaseModel):
    """A row of raw values: named fields are typed, further ones are kept as they are."""

    model_config = ConfigDict(extra="allow")


class CheckRow(Row):
    """One judgement."""

    name: str
    outcome: Outcome
    value: float | int | str | bool | None
    wanted: str
    reason: str | None = None
    """Why it is unsupported, or where it failed."""


class CalibrationRow(Row):
    """One direction of one link before the load."""

    link: str
    direction: str
    wanted_rtt_ms: float
    measured_rtt_ms: float | None
    wanted_rate_mbps: float | None
    measured_rate_mbps: float | None
    wanted_loss: float
    measured_loss: float | None
    inside: bool


class RequestRow(Row):
    """One request through the system under test (or, under `baseline`, through a plain server)."""

    id: str
    model: str
    prompt_tokens: int
    cached_tokens: int | None = None
    site: str | None = None
    """Where it was prefilled."""
    reason: str | None = None
    """Why there."""
    sent_s: float = 0.0
    """Since the repetition's start."""
    ttft_s: float | None = None
    e2e_s: float | None = None
    kv_bytes: int | None = None
    tokens_equal: bool | None = None
    """Whether its token ids equal the plain server's; None where not compared."""
    error: str | None = None


class LinkRow(Row):
    """One direction of a link over one sampling interval that ends at `at_s`."""

    at_s: float
    link: str
    direction: str
    bytes: int
    drops: int
    backlog_bytes: int


class EventRow(Row):
    """Something that happened, at the time it truly did."""

    at_s: float
    event: str


class Repetition(Row):
    """One pass through the load."""

    index: int
    requests: list[RequestRow] = []
    links: list[LinkRow] = []
    events: list[EventRow] = []


class Run(BaseModel):
    """The whole record."""

    model_config = ConfigDict(extra="allow")

    experiment: str
    commit: str
    started: str
    versions: dict[str, str]
    machine: dict[str, Any]
    emulation: Literal["native", "appliance", "simulated"]
    scale: float = 1
    calibration: list[CalibrationRow] = []
    checks: list[CheckRow] = []
    repetitions: list[Repetition] = []
    baseline: list[RequestRow] = []
    controls: list[Row] = []
    void: list[Row] = []
    parts: list[str] = []
    description: str = ""
    definition: dict[str, Any] = {}
    """The experiment file as it was run, so that checks and figures need nothing else."""
    files: Annotated[dict[str, str], Field(default_factory=dict)]
    """Rows kept outside: field to file name."""


def stamp(now: datetime | None = None) -> str:
    """A run's folder name, UTC."""
    return (now or datetime.now(UTC)).strftime(K_STAMP)


def write_run(run: Run, folder: Path) -> Path:
    """Write FOLDER/run.json; where it would be too large, raw rows go to .jsonl.gz files. Paths of files in
    FOLDER are kept as seen from there: a record may be moved, and names no place of its machine.

    What was there stays whole until all that is new is on the disk: files of rows have names of their own
    content, and run.json, which names them, is replaced last. Raises OSError, for example where the disk is
    full; the former record is then untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = run.model_dump(mode="json")
    bare = _without(folder)
    text = bare(_dumps(data))
    if len(text) > K_INLINE_BYTES:
        data["files"] = {}
        for field in K_OUTSIDE:
            rows = _flat(data[field]) if field == "repetitions" else data[field]
            data["files"][field] = _write_rows(folder, field, rows, bare)
            data[field] = []
        text = bare(_dumps(data))
    target = folder / K_RUN_FILE
    with _draft(target) as (file, draft):
        file.write(text.encode())
    draft.replace(target)
    named = set((data.get("files") or {}).values())
    for field in K_OUTSIDE:
        for old in folder.glob(f"{field}*.jsonl.gz"):
            if old.name not in named:
                old.unlink()
    return target


@contextmanager
def _draft(target: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A file beside `target`, on the disk when the context ends; gone where it can't be written."""
    path = target.with_name(f".{target.name}.new")
    try:
        with path.open("wb") as file:
            yield file, path
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


def read_run(path: Path) -> Run:
    """A run from its folder or its run.json. Raises UsageError when it isn't there or isn't one."""
    file = path / K_RUN_FILE if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{file}: no such run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file}: not a run: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{file}: not a run: a {type(data).__name__}")
    if "checks" in data and "emulation" not in data:
        raise UsageError(
            f"{file}: a record of `prfaas-testbed {data.get('experiment')}`, not of `run`: it was judged "
            "when it was made, by its `checks`"
        )
    files = data.get("files") or {}
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UsageError(f"{file}: files: expected names by field")
    for field, name in files.items():
        if "/" in name or field not in K_OUTSIDE:
            raise UsageError(f"{file}: files.{field} names {name!r}, which isn't a file beside it")
        rows = list(_read_rows(file.parent / name))
        data[field] = _nested(rows) if field == "repetitions" else rows
    try:
        return Run.model_validate(data)
    except ValidationError as error:
        raise first_fault(error, str(file), Run) from None


def _dumps(data: object) -> str:
    """One row a line: a diff or a `grep` of a run stays readable."""
    return (
        json.dumps(data, indent=None, separators=(",", ":"), allow_nan=False).replace('},{"', '},\n{"') + "\n"
    )


def _without(folder: Path) -> Callable[[str], str]:
    """What takes the folder off the paths in a JSON text."""
    names = {json.dumps(str(one))[1:-1] for one in (folder, folder.resolve()) if len(one.parts) > 1}
    either = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = re.compile(f"(?<![\\w./-])(?:{either})/") if names else None
    return lambda text: pattern.sub("", text) if pattern else text


def _flat(repetitions: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for repetition in repetitions:
        yield {"index": repetition["index"]}
        for kind in ("requests", "links", "events"):
            for row in repetition[kind]:
                yield {"repetition": repetition["index"], "kind": kind, "row": row}


def _nested(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        if "kind" not in row:
            found[row["index"]] = {"index": row["index"], "requests": [], "links": [], "events": []}
        else:
            found[row["repetition"]][row["kind"]].append(row["row"])
    return list(found.values())


def _write_rows(folder: Path, field: str, rows: Iterable[dict[str, Any]], bare: Callable[[str], str]) -> str:
    """The name of the file, which is made of what it holds: the same rows give the same file."""
    seen = hashlib.sha256()
    with (
        _draft(folder / f"{field}.jsonl.gz") as (raw, draft),
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file,
    ):
        for row in rows:
            line = bare(json.dumps(row, separators=(",", ":"))).encode() + b"\n"
            seen.update(line)
            file.write(line)
    name = f"{field}-{seen.hexdigest()[:K_NAME_DIGITS]}.jsonl.gz"
    draft.replace(folder / name)
    return name


def _read_rows(path: Path) -> Iterable[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: can't be read: {error}") from None
