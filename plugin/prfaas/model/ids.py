"""Names of things. All are plain strings, so that they pass through JSON and YAML as they are.

Units, here and everywhere: `_s` seconds, `_bytes` bytes, `_bps` BITS a second, `_tokens` tokens, `_rps`
requests a second. `now` and `_at_s` are seconds on one monotonic clock of the process that asks.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

SiteId: TypeAlias = str
"""A data centre, as the topology names it."""
InstanceId: TypeAlias = str
"""One serving instance; unique over all sites."""
ModelId: TypeAlias = str
RequestId: TypeAlias = str
TenantId: TypeAlias = str
ClassId: TypeAlias = str
"""An SLO class, as the policy's configuration names it."""
PolicyName: TypeAlias = str
PumpId: TypeAlias = str


class LinkId(NamedTuple):
    """One direction between two sites. Prints as `east>west`."""

    source: SiteId
    target: SiteId

    def __str__(self) -> str:
        return f"{self.source}>{self.target}"

    @classmethod
    def parse(cls, text: str) -> LinkId:
        """The inverse of str(). Raises ValueError."""
        source, arrow, target = text.partition(">")
        if not arrow or not source or not target or ">" in target:
            raise ValueError(f"{text!r} is not a link; expected SOURCE>TARGET")
        return cls(source, target)
