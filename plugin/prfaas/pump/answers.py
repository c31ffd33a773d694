"""What the pump that keeps a ledger answers, as values. It may be of another version: fields that aren't
known here are passed over. What is no answer is refused, for nonsense would end in the reckoning of rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from prfaas.admission import Share
from prfaas.model.ids import LinkId, PumpId
from prfaas.model.observations import LinkEstimate


def share_of(link: LinkId, body: Mapping[str, Any]) -> Share:
    """A share as an answer has it. Raises KeyError, TypeError or ValueError."""
    return Share(
        link=link,
        pump=PumpId(str(body["pump"])),
        rate_bps=_number(body["rate_bps"]),
        bytes=int(_number(body["bytes"])),
        ttl_s=_number(body["ttl_s"]),
        floor_bps=_number(body["floor_bps"]),
        serial=int(_number(body["serial"])),
    )


def estimate_of(link: LinkId, body: Mapping[str, Any], now: float) -> LinkEstimate:
    """An estimate as an answer has it. Raises KeyError, TypeError or ValueError."""
    found: dict[str, Any] = {}
    for one in fields(LinkEstimate):
        if one.name in ("link", "at_s") or (one.name not in body and one.default is not MISSING):
            continue
        value = body[one.name]
        found[one.name] = bool(value) if one.name == "up" else _number(value)
    return LinkEstimate(link=link, at_s=now, **found)


def _number(value: object) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} where a number from 0 on is wanted")
    return value
