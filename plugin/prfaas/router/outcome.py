"""How a request ended, for the event log, and what of it the client is told in headers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

K_REASON_CHARACTERS = 240
_UNPRINTABLE = re.compile(r"[^ -~]")


@dataclass(slots=True)
class Outcome:
    """One request, from its arrival to its end; a line of the event log."""

    at_s: float
    request: str
    endpoint: str
    tenant: str = ""
    model: str = ""
    status: int = 0
    attempts: int = 0
    site: str | None = None
    reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    predicted_cached_tokens: int | None = None
    moved_tokens: int = 0
    """Of its prompt, brought to the prefill server from another site's before it was sent there."""
    predicted_ttft_s: float | None = None
    ttft_s: float | None = None
    e2e_s: float = 0.0
    decode_site: str | None = None
    decode_s: float | None = None
    """Whole answers alone: from the first token (or prefill's end, where that can't be seen) to the last."""
    room: int | None = None
    """The last attempt's bootstrap room, by which pumps and servers know it; None where none was used."""
    error: str | None = None
    failures: list[str] = field(default_factory=list)
    event: str = "outcome"


def answer_headers(outcome: Outcome, correlation: str | None = None) -> dict[str, str]:
    """The x-prfaas- headers of an answer. `correlation`: the client's own id, given back as x-request-id.

    x-prfaas-room is the bootstrap room of the attempt that answered: pumps' records bear it too.
    """
    headers = {"x-prfaas-request-id": outcome.request, "x-request-id": correlation or outcome.request}
    if outcome.site is not None:
        headers["x-prfaas-site"] = outcome.site
        headers["x-prfaas-reason"] = header_text(outcome.reason)
        headers["x-prfaas-attempts"] = str(outcome.attempts)
    if outcome.room is not None:
        headers["x-prfaas-room"] = str(outcome.room)
    if outcome.moved_tokens:
        headers["x-prfaas-moved-tokens"] = str(outcome.moved_tokens)
    if outcome.predicted_ttft_s is not None:
        headers["x-prfaas-predicted-ttft-ms"] = f"{outcome.predicted_ttft_s * 1e3:.1f}"
    return headers


def header_text(text: str) -> str:
    """Printable ASCII, short: a reason may hold names from outside."""
    return _UNPRINTABLE.sub("?", text[:K_REASON_CHARACTERS])
