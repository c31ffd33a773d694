"""What both sides wrote of each room: digests of source and landed bytes, sizes and times. Pure but for
reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Moved:
    """One room's transfer; times on CLOCK_MONOTONIC."""

    source_digest: str | None = None
    landed_digest: str | None = None
    payload_bytes: int | None = None
    start_s: float | None = None
    end_s: float | None = None
    resent_blocks: int | None = None
    rid: str = ""
    """The prefill server's name of the request, where it tells."""


def read_moved(folder: Path) -> dict[int, Moved]:
    """By room, from every *.jsonl of the folder, without lines that were cut off (the last, or by a full
    disk).
    """
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.jsonl")):
        text = path.read_text(encoding="utf-8")
        for line in text[: text.rfind("\n") + 1].splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
    return moved_of(rows)


def moved_of(rows: Iterable[Mapping[str, Any]]) -> dict[int, Moved]:
    """Rows of profiled instances (side source, landed) and of the plugin's `verify:` (side sent, landed)."""
    found: dict[int, Moved] = {}
    for row in rows:
        moved = found.setdefault(int(row["room"]), Moved())
        digest = str(row["digest"]) if "digest" in row else _digest(row)
        if row["side"] == "landed":
            moved.landed_digest = digest
            moved.end_s = float(row["at_s"])
            if "pages" in row:
                moved.payload_bytes = int(row["bytes"]["kv"]) + int(row["bytes"]["state"])
        else:
            moved.source_digest = digest
            moved.start_s = row.get("start_s", row.get("begun_s"))
            moved.resent_blocks = row.get("resent_blocks")
            moved.rid = str(row.get("rid", ""))
            if "digest" in row:
                moved.payload_bytes = int(row["bytes"])
    return found


def _digest(row: Mapping[str, Any]) -> str:
    """One digest of all of a room's buffers: pages, KV of each layer, state, auxiliary data."""
    parts = [row["pages"], row["kv"], row["state"], row["aux"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
