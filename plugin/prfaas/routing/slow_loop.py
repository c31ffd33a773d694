"""The slow loop: which stage binds, what the plan would be, and one change of role at a time.

Stages of a local cluster and its PrfaaS clusters (the report's Θ): offloaded prefill, local prefill,
decode. At each look the loop is given how busy they are and the planner's System: the lengths of late, the
bandwidth of now, the instances. When the planner's optimum asks for another split of the local instances
`patience` looks in a row, and promises `least_gain` more throughput over the next `holds_s`, one instance is
converted towards it: drain, switch, settle, look again. The loop answers steps and does nothing itself. In a
dry run steps are marked as such and nothing is expected to follow.

What a conversion costs is time: the gain begins once all instances that the plan asks for have turned. It
costs no throughput, for the role that gives an instance has it to spare, or the plan wouldn't ask for it. The
seconds are the profile's until a conversion has been seen, and the last one's from then on; drains count by
half, as the instance works on, on less and less. Beyond capacity an instance may have work for minutes: it
drains as long as something on it ends, and is given up when nothing did for `drain_limit_s`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from prfaas.config.policy import SlowLoopConfig
from prfaas.model.ids import InstanceId, SiteId
from prfaas.model.observations import InstanceObservation, Role, SiteObservation
from prfaas.model.profiles import RoleSwitch
from prfaas.planner.optimum import best_threshold, grid_of, optimum
from prfaas.planner.system import Plan, System


class Stage(StrEnum):
    """What can bind."""

    OFFLOAD = "offload"  # PrfaaS prefill or its link
    LOCAL_PREFILL = "local-prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class StageLoad:
    """One stage's use since the last look."""

    stage: Stage
    utilisation: float
    """Share of the time, or of the rate, in use: 0 to 1."""
    queue_s: float
    """Mean wait in front of it."""


class StepKind(StrEnum):
    DRAIN = "drain"  # send it nothing new, wait until it is idle
    SWITCH = "switch"  # POST /pd_role_switch
    RESUME = "resume"  # take it back into service (switched, or given up)


@dataclass(frozen=True, slots=True)
class Step:
    """What the shell is to do now, and why."""

    kind: StepKind
    site: SiteId
    instance: InstanceId
    role: Role
    """The role it is to have in the end."""
    reason: str
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Proposal:
    """The loop's opinion after one look."""

    binding: Stage
    """The busiest stage."""
    target: Plan | None
    """The planner's optimum; None when a role has no instance, so that there is nothing to divide."""
    here: Plan | None
    """The best that the split of now can do: its threshold is the one to use until roles change."""
    agreed: int
    """Looks in a row that asked for the same change."""
    step: Step | None = None
    gained: float = 0.0
    """Requests that the target would carry beyond `here` within `holds_s`, once instances have turned."""


@dataclass(slots=True)
class _Conversion:
    instance: InstanceId
    role: Role
    since_s: float
    ended_s: float
    """When something on it last ended."""
    left: tuple[int, float]
    """Requests and work that were left then."""
    switching: bool = False
    drained_s: float = 0.0
    """How long it drained."""


class SlowLoop:
    """One local cluster's roles.

    The shell calls `look` now and then, `on_drained`, `on_switched`, `on_failed`. `switch`: what a conversion
    takes by the cluster's profile; None: not known, and reckoned as nothing until one has been seen.
    """

    def __init__(self, site: SiteId, config: SlowLoopConfig, switch: RoleSwitch | None = None) -> None:
        self.site = site
        self.config = config
        self._switch_s: dict[Role, float] = {}
        self._drained_s: dict[Role, float] = {}
        """The last drains."""
        if switch is not None:
            self._switch_s = {Role.PREFILL: switch.to_prefill_s, Role.DECODE: switch.to_decode_s}
        self._wanted = 0
        self._agreed = 0
        self._next_look_s = -math.inf
        self._conversion: _Conversion | None = None

    @property
    def converting(self) -> InstanceId | None:
        """The one instance that is being converted."""
        return None if self._conversion is None else self._conversion.instance

    def out_of_service_s(self, role: Role, drain_s: float = 0.0) -> float:
        """Seconds that a conversion to `role` is believed to take, in which the instance gives nothing, where
        what it has takes drain_s. Drains count by half."""
        return self._switch_s.get(role, 0.0) + max(drain_s, self._drained_s.get(role, 0.0)) / 2

    def due(self, now: float) -> bool:
        """Whether `look` would look."""
        return now >= self._next_look_s

    def look(
        self,
        site: SiteObservation,
        loads: Sequence[StageLoad],
        system: System,
        now: float,
        convertible: Collection[InstanceId] | None = None,
    ) -> Proposal | None:
        """None between looks. Never proposes to take a role's last instance away.

        `system` is as it is now, but for local_instances, which is counted from `site`. `convertible`:
        instances that may change their role; None: all.
        """
        if not self.due(now) or not loads:
            return None
        self._next_look_s = now + self.config.look_every_s
        binding = max(loads, key=lambda load: (load.utilisation, load.queue_s)).stage
        able = [one for one in site.instances if one.healthy and one.role is not Role.COLLOCATED]
        prefills = [one for one in able if one.role is Role.PREFILL]
        decodes = [one for one in able if one.role is Role.DECODE]
        target = here = None
        if prefills and decodes:
            now_system = system.changed(local_instances=len(able))
            grid = grid_of(now_system)
            target = optimum(now_system, grid)
            here = best_threshold(now_system, len(prefills), grid)
        if self._conversion is not None:
            return Proposal(binding, target, here, self._agreed, self.overdue(site, now))
        turns = 0 if target is None else target.prefill - len(prefills)
        giving = decodes if turns > 0 else prefills
        free = [one for one in giving if convertible is None or one.instance in convertible]
        one = min(free, key=_busyness) if free else None
        role = Role.PREFILL if turns > 0 else Role.DECODE
        drain_s = 0.0 if one is None else _drain_s(one, loads, system)
        wanted, gained, out_s = 0, 0.0, self.out_of_service_s(role, drain_s)
        if target is not None and here is not None and turns:
            lasts_s = max(0.0, self.config.holds_s - abs(turns) * out_s)
            gained = (target.throughput_rps - here.throughput_rps) * lasts_s
            if gained >= here.throughput_rps * self.config.least_gain * self.config.holds_s and gained > 0:
                wanted = 1 if turns > 0 else -1
        self._agreed = self._agreed + 1 if wanted and wanted == self._wanted else int(bool(wanted))
        self._wanted = wanted
        if (
            target is None
            or here is None
            or not wanted
            or self._agreed < self.config.patience
            or len(giving) < 2
            or one is None
        ):
            return Proposal(binding, target, here, self._agreed, None, gained)
        split = f"{len(prefills)}/{len(decodes)}"
        reason = (
            f"{binding.value} binds; {target.prefill}/{target.decode} would carry "
            f"{target.throughput_rps:.2f} req/s, {split} carries {here.throughput_rps:.2f}"
        )
        if out_s:
            reason += f"; out for {out_s:.3g} s, {gained:.0f} requests more in {self.config.holds_s:g} s"
        self._agreed = 0
        step = Step(StepKind.DRAIN, self.site, one.instance, role, reason, self.config.dry_run)
        if not self.config.dry_run:
            self._conversion = _Conversion(one.instance, role, now, now, _left(one))
        return Proposal(binding, target, here, self._agreed, step, gained)

    def on_drained(self, instance: InstanceId, now: float) -> Step | None:
        """It is idle: switch it. None when it isn't being converted."""
        conversion = self._conversion
        if conversion is None or conversion.instance != instance or conversion.switching:
            return None
        conversion.switching = True
        conversion.drained_s, conversion.since_s = now - conversion.since_s, now
        return Step(StepKind.SWITCH, self.site, instance, conversion.role, "drained")

    def on_switched(self, instance: InstanceId, now: float) -> Step | None:
        """The server says that it has its new role; the next look waits for its effect."""
        conversion = self._conversion
        if conversion is not None and conversion.instance == instance and conversion.switching:
            self._switch_s[conversion.role] = now - conversion.since_s
            self._drained_s[conversion.role] = conversion.drained_s
        return self._end(instance, f"switched to {self._role(instance)}", now, self.config.settle_s)

    def on_failed(self, instance: InstanceId, reason: str, now: float) -> Step | None:
        """The server refused or died: back into service as it was, and not at once again."""
        return self._end(instance, f"conversion failed: {reason}", now, 2 * self.config.settle_s)

    def overdue(self, site: SiteObservation, now: float) -> Step | None:
        """A drain in which nothing ends is given up, at looks and between. A switch is the shell's to end."""
        conversion = self._conversion
        if conversion is None or conversion.switching:
            return None
        for one in site.instances:
            if one.instance == conversion.instance:
                requests, work = _left(one)
                if requests < conversion.left[0] or work < conversion.left[1]:
                    conversion.ended_s, conversion.left = now, (requests, work)
        if now - conversion.ended_s < self.config.drain_limit_s:
            return None
        return self._end(conversion.instance, "not drained in time", now, 2 * self.config.settle_s)

    def _end(self, instance: InstanceId, reason: str, now: float, pause_s: float) -> Step | None:
        conversion = self._conversion
        if conversion is None or conversion.instance != instance:
            return None
        self._conversion = None
        self._agreed = self._wanted = 0
        self._next_look_s = now + pause_s
        return Step(StepKind.RESUME, self.site, instance, conversion.role, reason)

    def _role(self, instance: InstanceId) -> str:
        conversion = self._conversion
        return conversion.role.value if conversion is not None and conversion.instance == instance else "?"


def _drain_s(one: InstanceObservation, loads: Sequence[StageLoad], system: System) -> float:
    """What the work that it has will take. A decode instance is bound to its requests from their dispatch on,
    while they wait for prefill."""
    if one.role is Role.PREFILL:
        return one.prefill_backlog_s or 0.0
    if not one.running + one.waiting:
        return 0.0
    wait_s = max((load.queue_s for load in loads if load.stage is not Stage.DECODE), default=0.0)
    turns = 1.0 + one.waiting / one.max_running if one.max_running else 1.0
    return wait_s + turns * system.output_tokens * system.decode.step_s(max(1, one.running))


def _left(one: InstanceObservation) -> tuple[int, float]:
    """Requests on it, and prefill in seconds, or tokens where it tells these."""
    work = one.prefill_backlog_s
    return one.running + one.waiting, float(one.waiting_uncached_tokens) if work is None else work


def _busyness(one: InstanceObservation) -> tuple[float, int]:
    return (one.prefill_backlog_s or 0.0, one.running + one.waiting)
