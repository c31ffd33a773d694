"""Schema of topologies/networks/*.yaml: sites, hubs, and directed links with all that can be wrong with one.

A link carries packets one way. `between: [a, b]` writes the same link in both directions, `from:`/`to:` one.
Sites end traffic, hubs pass it on; a path from site to site is the direct link or leads through hubs only.
The identity of a directed link is the text `a->b`.

Rates and queues are those of the network that is meant. `scale.factor` divides them (and the experiment's
bytes) for emulation, so that durations stay; `emulated()` is the network as it is really built.
"""

from __future__ import annotations

import heapq
import ipaddress
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from prfaas.config.loading import Strict, load, pattern, unknown_name
from prfaas.config.places import checkout
from prfaas.model.errors import ConfigError, UsageError

K_NAME = r"^[a-z][a-z0-9]{0,9}$"  # a node's name is part of interface names, which hold 15 characters
K_FRAME_OVERHEAD_BYTES = 14  # an Ethernet header: what a queueing discipline counts beyond the IP packet
K_MIN_QUEUE_BYTES = 64 * 1024
K_LEAST_QUEUE_BYTES = 3028  # two full frames: what a scaled queue keeps
K_NETWORKS = checkout() / "topologies" / "networks"

Name = Annotated[
    str, pattern(K_NAME, "a site's or hub's name: a letter, then up to 9 letters or digits; all small")
]
Percent = Annotated[float, Field(ge=0, le=100)]
Milliseconds = Annotated[float, Field(ge=0, le=10_000)]
Mbps = Annotated[float, Field(ge=0.05, le=1_000_000)]


class BurstyLoss(Strict):
    """Gilbert-Elliott: a chain of a good and a bad state that may step once a packet.

    The packet is lost with the probability of the state it finds. Mean length of a stay in the bad state:
    100 / leave_percent packets.
    """

    enter_percent: Annotated[float, Field(gt=0, lt=100)]
    """Probability of going from good to bad, a packet (p)."""
    leave_percent: Annotated[float, Field(gt=0, le=100)]
    """Probability of going from bad to good, a packet (r)."""
    loss_percent: Percent = 100
    """Loss in the bad state (1-h)."""
    good_loss_percent: Percent = 0
    """Loss in the good state (1-k)."""


class LinkChange(Strict):
    """What an event of a timeline does to a directed link; a field left out stays as it is."""

    delay_ms: Milliseconds | None = None
    jitter_ms: Milliseconds | None = None
    rate_mbps: Mbps | None = None
    """Null, when written, takes the limit away."""
    queue_bytes: Annotated[int, Field(ge=1500)] | None = None
    loss_percent: Percent | None = None
    """Random loss; ends bursty loss."""
    bursty_loss: BurstyLoss | None = None
    """Ends random loss."""
    corrupt_percent: Percent | None = None
    duplicate_percent: Percent | None = None
    reorder_percent: Percent | None = None
    down: bool | None = None
    """True: every packet is dropped without a word, as on a cut fibre far away; false: up again."""

    @model_validator(mode="after")
    def _something(self) -> LinkChange:
        if not self.model_fields_set:
            raise ValueError("a change names at least one of: " + ", ".join(type(self).model_fields))
        if self.loss_percent is not None and self.bursty_loss is not None:
            raise ValueError("loss_percent and bursty_loss exclude each other")
        empty = [name for name in self.model_fields_set if getattr(self, name) is None]
        if any(name not in ("rate_mbps", "queue_bytes", "bursty_loss") for name in empty):
            raise ValueError(
                f"{', '.join(sorted(empty))}: null only means something for rate_mbps and queue_bytes"
            )
        return self

    def divided(self, factor: float) -> LinkChange:
        """The same with rate and queue divided, as the link's."""
        update: dict[str, object] = {}
        if self.rate_mbps is not None:
            update["rate_mbps"] = self.rate_mbps / factor
        if self.queue_bytes is not None:
            update["queue_bytes"] = max(K_LEAST_QUEUE_BYTES, round(self.queue_bytes / factor))
        return self.model_copy(update=update)


class Impairments(Strict):
    """The state of one directed link."""

    delay_ms: Milliseconds = 0
    """One way, at no load."""
    jitter_ms: Milliseconds = 0
    """Spread around delay_ms; packets keep their order (reordering is asked for by reorder_percent)."""
    jitter_distribution: Literal["uniform", "normal", "pareto", "paretonormal"] = "normal"
    rate_mbps: Mbps | None = None
    """Of Ethernet frames. Null: as fast as the machine."""
    queue_bytes: Annotated[int, Field(ge=1500)] | None = None
    """Before the link; what does not fit is dropped. Default: one round trip at the rate, at least 64 KiB."""
    queue_packets: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    loss_percent: Percent = 0
    bursty_loss: BurstyLoss | None = None
    corrupt_percent: Percent = 0
    """One bit of the packet flipped; the receiver's checksum drops it."""
    duplicate_percent: Percent = 0
    reorder_percent: Percent = 0
    """These packets overtake: they leave without delay."""
    mtu_bytes: Annotated[int, Field(ge=576, le=9000)] = 1500
    ecn: bool = False
    """The queue marks ECN-capable packets as it fills (RED), before it drops."""
    down: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Impairments:
        if self.queue_bytes is not None and self.queue_packets is not None:
            raise ValueError("queue_bytes and queue_packets exclude each other")
        if self.bursty_loss is not None and self.loss_percent:
            raise ValueError("loss_percent and bursty_loss exclude each other")
        if self.reorder_percent and not self.delay_ms:
            raise ValueError("reorder_percent needs a delay_ms, for a packet to overtake in")
        if self.jitter_ms > self.delay_ms:
            raise ValueError("jitter_ms must not exceed delay_ms: nothing arrives before it was sent")
        if self.ecn and self.rate_mbps is None:
            raise ValueError("ecn marks in a queue, and without a rate_mbps there is none")
        if self.ecn and self.queue_packets is not None:
            raise ValueError("ecn needs the queue in bytes (queue_bytes)")
        return self

    @property
    def buffer_bytes(self) -> int:
        """The queue in bytes, the default worked out; queue_packets counted as full ones."""
        frame_bytes = self.mtu_bytes + K_FRAME_OVERHEAD_BYTES
        if self.queue_packets is not None:
            return self.queue_packets * frame_bytes
        if self.queue_bytes is not None:
            return self.queue_bytes
        bandwidth_delay_bytes = (self.rate_mbps or 0) * 1e6 / 8 * 2 * self.delay_ms / 1e3
        return max(K_MIN_QUEUE_BYTES, round(bandwidth_delay_bytes))

    @property
    def mean_loss(self) -> float:
        """Share of packets lost to random or bursty loss in the long run, 0..1."""
        if self.bursty_loss is None:
            return self.loss_percent / 100
        b = self.bursty_loss
        bad = b.enter_percent / (b.enter_percent + b.leave_percent)
        return (bad * b.loss_percent + (1 - bad) * b.good_loss_percent) / 100

    def divided(self, factor: float) -> Impairments:
        """The same with rate and queue divided; delay and loss don't scale."""
        update: dict[str, object] = {}
        if self.rate_mbps is not None:
            update["rate_mbps"] = self.rate_mbps / factor
        if self.queue_bytes is not None:
            update["queue_bytes"] = max(
                2 * (self.mtu_bytes + K_FRAME_OVERHEAD_BYTES), round(self.queue_bytes / factor)
            )
        return self.model_copy(update=update)

    def undoing(self, change: LinkChange) -> LinkChange:
        """What brings this state back where `change` was made to it since."""
        names = set(change.model_fields_set)
        if names & {"loss_percent", "bursty_loss"}:
            # Either kind of loss ends the other, which comes back with it.
            names -= {"loss_percent", "bursty_loss"}
            names.add("loss_percent" if self.bursty_loss is None else "bursty_loss")
        return LinkChange.model_validate({name: getattr(self, name) for name in names})

    def changed(self, change: LinkChange) -> Impairments:
        """The link after `change`. Raises UsageError when the result contradicts itself."""
        update = {name: getattr(change, name) for name in change.model_fields_set}
        if change.loss_percent is not None:
            update["bursty_loss"] = None
        elif change.bursty_loss is not None:
            update["loss_percent"] = 0.0
        if update.get("queue_bytes") is not None and self.queue_packets is not None:
            raise UsageError(
                "this change can't be made: the link's queue is in packets, queue_bytes is in bytes"
            )
        fields = {name: getattr(self, name) for name in Impairments.model_fields} | update
        try:
            return Impairments.model_validate(fields)
        except ValidationError as error:
            why = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            raise UsageError(f"this change can't be made: {why}") from None


class LinkSpec(Impairments):
    """A link as it is written: `between: [a, b]` (both directions alike) or `from:` and `to:` (one)."""

    between: tuple[Name, Name] | None = None
    source: Name | None = Field(default=None, alias="from")
    target: Name | None = Field(default=None, alias="to")

    @model_validator(mode="after")
    def _ends(self) -> LinkSpec:
        one_way = self.source is not None and self.target is not None
        if (self.between is None) == (not one_way) or (self.between and (self.source or self.target)):
            raise ValueError("a link says either between: [a, b] or from: a and to: b")
        ends = self.ends()
        if ends[0][0] == ends[0][1]:
            raise ValueError("a link joins two different nodes")
        return self

    def ends(self) -> list[tuple[str, str]]:
        if self.between is not None:
            a, b = self.between
            return [(a, b), (b, a)]
        assert self.source is not None
        assert self.target is not None
        return [(self.source, self.target)]

    def impairments(self) -> Impairments:
        return Impairments.model_validate({name: getattr(self, name) for name in Impairments.model_fields})


class Scale(Strict):
    factor: Annotated[float, Field(ge=1, le=100_000)]
    """Rates, queues and the experiment's bytes are divided by this; delays and loss are not."""
    text: Annotated[str, Field(min_length=20)]
    """What the scaled network does not preserve, for the report."""


class SiteSpec(Strict):
    text: str = ""


class Topology(Strict):
    """One file of topologies/networks/."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,30}$")]
    text: str
    """One or two lines on what it stands for."""
    sites: Annotated[dict[Name, SiteSpec], Field(min_length=2, max_length=64)]
    hubs: tuple[Name, ...] = ()
    links: Annotated[tuple[LinkSpec, ...], Field(min_length=1)]
    partial: bool = False
    """Whether some sites have no way to each other; otherwise that is an error."""
    scale: Scale | None = None
    subnet: str = "10.77.0.0/16"
    """Sites take the /24s of this network in the order they are written: 10.77.1.0/24, 10.77.2.0/24, …"""

    @field_validator("subnet")
    @classmethod
    def _private(cls, text: str) -> str:
        network = ipaddress.ip_network(text)
        if network.version != 4 or network.prefixlen != 16 or not network.is_private:
            raise ValueError("a private IPv4 network of prefix length 16, such as 10.77.0.0/16")
        return text

    @model_validator(mode="after")
    def _joined(self) -> Topology:
        known = [*self.sites, *self.hubs]
        if len(set(known)) != len(known):
            raise ValueError("a name is used twice among sites and hubs")
        seen: set[tuple[str, str]] = set()
        for link in self.links:
            for ends in link.ends():
                for name in ends:
                    if name not in known:
                        raise ValueError(
                            f"link {ends[0]}->{ends[1]}: no site or hub {name!r}; known: {', '.join(known)}"
                        )
                if ends in seen:
                    raise ValueError(f"link {ends[0]}->{ends[1]} is written twice")
                seen.add(ends)
        for a, b in seen:
            if (b, a) not in seen:
                raise ValueError(f"link {a}->{b} has no way back; write {b}->{a} as well")
        if not self.partial:
            for a, b in self.site_pairs():
                self.path(a, b)
        return self

    def site_pairs(self) -> Iterator[tuple[str, str]]:
        """All ordered pairs of sites that have a way to each other."""
        pairs = ((a, b) for a in self.sites for b in self.sites if a != b)
        return (pair for pair in pairs if self._joins(*pair)) if self.partial else pairs

    def _joins(self, a: str, b: str) -> bool:
        try:
            return bool(self.path(a, b))
        except ValueError:
            return False

    def directed(self) -> dict[str, Impairments]:
        """`a->b` to the link's state, as written (not scaled)."""
        return {f"{a}->{b}": link.impairments() for link in self.links for a, b in link.ends()}

    def emulated(self) -> dict[str, Impairments]:
        """`a->b` to the link's state as it is built: divided by the scale."""
        factor = self.scale.factor if self.scale else 1.0
        return {link_id: state.divided(factor) for link_id, state in self.directed().items()}

    def path(self, source: str, target: str) -> list[str]:
        """Link ids from site to site: through hubs only, least delay, then fewest links.

        Raises ValueError when there is none.
        """
        out: dict[str, list[tuple[float, str]]] = {}
        for link in self.links:
            for a, b in link.ends():
                out.setdefault(a, []).append((link.delay_ms, b))
        heap: list[tuple[float, int, tuple[str, ...]]] = [(0.0, 0, (source,))]
        done: set[str] = set()
        while heap:
            delay_ms, hops, nodes = heapq.heappop(heap)
            here = nodes[-1]
            if here == target:
                return [f"{a}->{b}" for a, b in itertools.pairwise(nodes)]
            if here in done or (here in self.sites and here != source):
                continue
            done.add(here)
            for more_ms, there in out.get(here, []):
                heapq.heappush(heap, (delay_ms + more_ms, hops + 1, (*nodes, there)))
        raise ValueError(f"no way from {source} to {target}: join them by a link or through hubs")


def link_id(source: str, target: str) -> str:
    return f"{source}->{target}"


def network_names(folder: Path = K_NETWORKS) -> list[str]:
    """Names of the topologies that come with the project."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def topology_file(name_or_path: str | Path, folder: Path = K_NETWORKS) -> Path:
    """The file of a name under topologies/networks/, or the path itself. Raises UsageError for an unknown
    name."""
    text = str(name_or_path)
    if not re.fullmatch(r"[a-z][a-z0-9-]*", text):
        return Path(text)
    path = folder / f"{text}.yaml"
    if not path.exists():
        raise unknown_name("network", text, folder, network_names(folder))
    return path


def load_topology(name_or_path: str | Path, folder: Path = K_NETWORKS) -> Topology:
    """A topology by its name under topologies/networks/, or by the path of a file.

    Raises UsageError for an unknown name or ConfigError for a faulty file.
    """
    path = topology_file(name_or_path, folder)
    topology = load(path, Topology)
    if topology.name != path.stem:
        raise ConfigError(str(path), "name", topology.name, f"expected {path.stem!r}, the file's own name")
    return topology
