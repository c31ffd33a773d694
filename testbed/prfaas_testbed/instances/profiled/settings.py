"""The file that a profiled instance is started with (written by the testbed's runner, or by hand)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from prfaas.config.experiment import Limits
from prfaas.config.loading import Strict

Port = Annotated[int, Field(ge=1, le=65535)]


class Settings(Strict):
    """One profiled instance."""

    name: str
    role: Literal["prefill", "decode", "collocated"]
    host: str
    port: Port
    bootstrap_port: Port | None = None
    """Prefill: where decode servers bring their grants; the HTTP port where absent."""
    model: str
    profile: str
    """A name under topologies/profiles, or a path."""
    scale: Annotated[float, Field(ge=1)] = 1
    """KV bytes are divided by this."""
    limits: Limits = Limits()
    priority_scheduling: bool = False
    """What waits for prefill is taken by its `priority`, as with SGLang's --enable-priority-scheduling."""
    decode_cache: bool = False
    """A decode instance keeps prefixes too, and is sent only what it lacks."""
    pump: Path | None = None
    """The pump's configuration; needed by prefill and decode."""
    ways: dict[str, str] = Field(default_factory=dict)
    """host:port of peers at other sites, and the host:port here that leads there by the pumps; others are
    reached as they are."""
    events_port: Port | None = None
    """Where KV events are published; none where absent."""
    events_replay_port: Port | None = None
    transfers_log: Path | None = None
    """A line a transfer: room, side, digest, bytes, times on CLOCK_MONOTONIC."""
    transfer_timeout_s: Annotated[float, Field(gt=0)] = 60
    fault: Literal["zero_kv", "drop_page"] | None = None
    """Planted between digest and wire, to see that it is found."""
    page_bytes: Annotated[int, Field(ge=64)] = 16384
    """What `drop_page` leaves out."""
