"""The `timeline:` of an experiment: what happens to links, servers and programs, and when.

The testbed does it to an emulated network and to processes; the simulator does what it can, and says of the
rest that it isn't simulated.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prfaas.config.loading import Strict, pattern
from prfaas.config.topology import LinkChange

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=64)]
Links = Annotated[
    str,
    pattern(r"^[a-z][a-z0-9]{0,9}<?->[a-z][a-z0-9]{0,9}$", "expected a->b, or a<->b for both directions"),
]
"""A directed link `a->b` as the topology has it, or both directions, `a<->b`."""
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def directed(links: str) -> list[str]:
    """The link ids that `a->b` or `a<->b` means."""
    if "<->" in links:
        a, _, b = links.partition("<->")
        return [f"{a}->{b}", f"{b}->{a}"]
    return [links]


class SetLink(Strict):
    """Change fields of a link, for a while or for good."""

    do: Literal["set_link"]
    at_s: Seconds
    link: Links
    """`a->b` one way, `a<->b` both."""
    set: LinkChange
    for_s: Positive | None = None
    """Then the former values come back."""


class LinkDown(Strict):
    """Nothing passes (a black hole: neither end is told) for a while."""

    do: Literal["link_down"]
    at_s: Seconds
    link: Links
    """`a->b` one way, `a<->b` both."""
    for_s: Positive


class Flap(Strict):
    """Down `off_s`, then up `on_s`, so many times."""

    do: Literal["flap"]
    at_s: Seconds
    link: Links
    """`a->b` one way, `a<->b` both."""
    on_s: Positive
    off_s: Positive
    times: Annotated[int, Field(ge=1)]


class CrossTraffic(Strict):
    """Traffic that isn't ours, over the same path."""

    do: Literal["cross_traffic"]
    at_s: Seconds
    source: Name
    target: Name
    kind: Literal["cubic", "bbr", "udp"] = "cubic"
    streams: Annotated[int, Field(ge=1, le=64)] = 1
    rate_mbps: Positive | None = None
    """A ceiling; needed for udp. Of Ethernet frames and before scale, as a link's."""
    for_s: Positive

    @model_validator(mode="after")
    def _udp_has_a_rate(self) -> CrossTraffic:
        if self.kind == "udp" and self.rate_mbps is None:
            raise ValueError("udp cross-traffic needs rate_mbps")
        return self


class CutStream(Strict):
    """Reset connections of the transfer between two sites while they carry data."""

    do: Literal["cut_stream"]
    at_s: Seconds
    source: Name
    target: Name
    streams: Annotated[int, Field(ge=1, le=64)] = 1


class Kill(Strict):
    """SIGKILL a server (with `signal: freeze`, SIGSTOP it), and start it again after a while."""

    do: Literal["kill"]
    at_s: Seconds
    instance: Name
    """An instance's name, or `router`."""
    what: Literal["server", "pump"] = "server"
    signal: Literal["kill", "freeze"] = "kill"
    restart_after_s: Positive | None = None
    """Start it again (thaw it) after this long; never where absent. Servers start a pump that they miss
    themselves."""


class FillDisk(Strict):
    """The disk that servers, pumps and the router write their files and logs to has no byte left."""

    do: Literal["fill_disk"]
    at_s: Seconds
    for_s: Positive


class StepClock(Strict):
    """What a site's programs take for the time of day is this much later (or earlier); then it is right
    again. Clocks that only go on, and timers, aren't touched: a step doesn't touch them either."""

    do: Literal["step_clock"]
    at_s: Seconds
    site: Name
    step_s: Annotated[int, Field(ge=-86400, le=86400)]
    for_s: Positive


class ReplaceCertificate(Strict):
    """Give a site's pumps a new certificate (or one that no peer trusts)."""

    do: Literal["replace_certificate"]
    at_s: Seconds
    site: Name
    trusted: bool = True


class Hostile(Strict):
    """Traffic that no well-behaved sender makes, from `source` to the pump of `target`."""

    do: Literal["hostile"]
    at_s: Seconds
    source: Name
    target: Name
    kind: Literal["corrupt_payload", "reset", "replay", "garbage"]
    """Other bytes under a live connection's next sequence numbers with a right TCP checksum; resets of live
    connections; segments sent again as they were; bytes that are no protocol of ours, and flags that are no
    handshake."""
    packets: Annotated[int, Field(ge=1, le=2000)] = 20


Event = Annotated[
    SetLink
    | LinkDown
    | Flap
    | CrossTraffic
    | CutStream
    | Kill
    | FillDisk
    | StepClock
    | ReplaceCertificate
    | Hostile,
    Field(discriminator="do"),
]
