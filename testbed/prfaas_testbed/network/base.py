"""What an emulation of the WAN must do, and the choice between those there are, by probing."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from prfaas.config.topology import Impairments
from prfaas.model.errors import MachineError, UsageError
from prfaas_testbed.network.hosts import Host
from prfaas_testbed.network.plan import Plan
from prfaas_testbed.network.router import RouterAgent
from prfaas_testbed.network.state import Record


class Emulation(abc.ABC):
    """Carries packets between devices of the `wan` host, one a site, with the real sch_netem in the way."""

    name: ClassVar[str]
    """As run.json says it."""
    reach_mbps: ClassVar[float | None]
    """The fastest link that it carries faithfully; None: as fast as the machine."""

    def __init__(self) -> None:
        self.does_without: dict[str, str] = {}
        """What would have kept it in time beside others' load, and why it isn't to be had here."""

    @classmethod
    @abc.abstractmethod
    def missing(cls) -> str | None:
        """Why this machine can't run it, or None when it can. Leaves the machine as it was."""
        ...

    @abc.abstractmethod
    def start(
        self, plan: Plan, wan: Host, devices: dict[str, str], record: Record, folder: Path
    ) -> RouterAgent:
        """Bring up the router on `devices` (site to the wan host's interface); the plan's routers then
        exist, with each site's device inside its own router under the name K_SITE_DEVICE. Raises
        MachineError.
        """
        ...

    def started(self, record: Record) -> None:
        """Put back what only the start needed."""
        return

    def cables(self, ends: Sequence[tuple[Host, str]]) -> None:
        """The ends of all cables between sites and the `wan` host: a host and its device. They can pass
        packets now.
        """
        return

    def settled(self) -> None:
        """The router has started the processes that it needs while load runs."""
        return

    @abc.abstractmethod
    def stop(self) -> None:
        """End the router. Safe to call twice, and when start failed."""
        ...

    @abc.abstractmethod
    def cpu_s(self) -> float:
        """Processor time that emulation has used so far; only differences mean something."""
        ...

    @abc.abstractmethod
    def accidents(self) -> dict[str, int]:
        """Counters of unplanned drops that the router can't see itself."""
        ...

    def check_reach(self, states: dict[str, Impairments]) -> None:
        """Raises MachineError for a link that is faster than this emulation carries faithfully."""
        for link, state in states.items():
            if self.reach_mbps is not None and (state.rate_mbps or 0) > self.reach_mbps:
                raise MachineError(
                    f"link {link}: {state.rate_mbps:g} Mbit/s is more than the {self.name} emulation carries "
                    f"faithfully ({self.reach_mbps:g} Mbit/s); give the topology a scale.factor"
                )


def emulations() -> dict[str, type[Emulation]]:
    """By name, the preferred first."""
    from prfaas_testbed.network.appliance import Appliance
    from prfaas_testbed.network.native import Native

    return {kind.name: kind for kind in (Native, Appliance)}


def create(name: str | None = None) -> Emulation:
    """The named emulation, or the first that this machine can run. Raises UsageError or MachineError."""
    kinds = emulations()
    if name is not None:
        if name not in kinds:
            raise UsageError(f"no emulation {name!r}; there are: {', '.join(kinds)}")
        reason = kinds[name].missing()
        if reason:
            raise MachineError(f"emulation {name}: {reason}")
        return kinds[name]()
    reasons = []
    for kind in kinds.values():
        reason = kind.missing()
        if reason is None:
            return kind()
        reasons.append(f"{kind.name}: {reason}")
    raise MachineError("no way to emulate a WAN here; " + "; ".join(reasons))
