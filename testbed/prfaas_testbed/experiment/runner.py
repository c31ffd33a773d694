"""An experiment from its file to its record: network up, calibrated, servers up, load, faults, judging.

with the network up: calibrate, try isolation, then for each model
    servers up -> plain answers -> repetitions (void ones again) -> controls -> servers down
checks -> run.json -> figures
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from prfaas.config.experiment import Capacity, Event, Experiment, ModelChoice
from prfaas.config.profile import find_profile
from prfaas.config.run import (
    CalibrationRow,
    EventRow,
    LinkRow,
    Repetition,
    RequestRow,
    Row,
    Run,
)
from prfaas.config.topology import Topology
from prfaas.model.errors import MachineError, PrfaasError
from prfaas_testbed.client import Answer, Shot
from prfaas_testbed.experiment.capacity import Search, rate_of, slo_share, with_rate
from prfaas_testbed.experiment.captures import Captures
from prfaas_testbed.experiment.controls import try_control
from prfaas_testbed.experiment.door import where_of
from prfaas_testbed.experiment.fleet import K_PUMP_PORT, Fleet
from prfaas_testbed.experiment.load import (
    Client,
    Planned,
    direct_shots,
    one_server_shots,
    plan,
    rows_of,
    wanted_bytes,
)
from prfaas_testbed.experiment.machine import K_TOPOLOGIES
from prfaas_testbed.experiment.metrics import equal_tokens
from prfaas_testbed.experiment.place import require_space
from prfaas_testbed.experiment.rounds import empty, play_rounds, probe_of
from prfaas_testbed.experiment.sites import try_isolation
from prfaas_testbed.experiment.timeline import Timeline
from prfaas_testbed.experiment.transfers import read_moved
from prfaas_testbed.experiment.watch import Observer

if TYPE_CHECKING:
    from prfaas_testbed.network import Network

K_VOID_AGAIN = 2  # how often a void repetition is run again before the machine is too busy
K_WARM_TOKENS = 64

Progress = Callable[[str], None]


class TooBusy(MachineError):
    """The machine can't emulate the network faithfully while it runs the load."""


class CalibrationMissed(PrfaasError):
    """The network isn't as the file asks for, so the load was not run."""


@dataclass(frozen=True)
class Attempt:
    """What one pass of the load gave."""

    rows: list[RequestRow]
    links: list[LinkRow]
    events: list[EventRow]
    void: str | None
    """Why it doesn't count: the emulator wasn't faithful."""


@dataclass
class Results:
    """What a run has gathered so far; also what a run that was stopped has."""

    calibration: list[CalibrationRow] = field(default_factory=list)
    repetitions: dict[int, Repetition] = field(default_factory=dict)
    baseline: list[RequestRow] = field(default_factory=list)
    controls: list[Row] = field(default_factory=list)
    void: list[Row] = field(default_factory=list)
    emulation: str = "native"
    without: dict[str, str] = field(default_factory=dict)
    """What the emulation couldn't have of this machine, and why."""
    network_s: dict[str, float] = field(default_factory=dict)
    """How long the network took to come up, and to go down with all that ran in it."""

    def repetition(self, index: int) -> Repetition:
        return self.repetitions.setdefault(index, Repetition(index=index))

    def into(self, run: Run) -> None:
        run.calibration, run.baseline = self.calibration, self.baseline
        run.controls, run.void = self.controls, self.void
        run.repetitions = [self.repetitions[i] for i in sorted(self.repetitions)]
        run.emulation = self.emulation  # type: ignore[assignment]
        if self.without:
            run.machine["emulation_does_without"] = self.without
        if self.network_s:
            run.model_extra["network_s"] = self.network_s  # type: ignore[index]


class Runner:
    """One experiment on this machine."""

    def __init__(
        self,
        experiment: Experiment,
        topology: Topology,
        folder: Path,
        results: Results,
        tell: Progress,
        wait_s: float = 0.0,
    ) -> None:
        """`wait_s`: how long to wait for another run to give the machine's network back."""
        self.experiment, self.topology, self.folder = experiment, topology, folder
        self.results, self.tell, self.wait_s = results, tell, wait_s
        self.real = "sglang" in experiment.kinds()
        self.scale = topology.scale.factor if topology.scale else 1.0
        self._deadline_s = float("inf")

    def run(self) -> None:
        """Fills `results`. Raises PrfaasError where the run can't go on; whatever it started is gone by
        then."""
        # Not before: it needs mininet, which reading and checking files don't.
        from prfaas_testbed.network import open_network

        filled = any(event.do == "fill_disk" for event in self.experiment.events())
        disks = [self.work(model) for model in self.experiment.models if filled]
        with open_network(
            self.topology, self.folder, progress=self.tell, wait_s=self.wait_s, disks=disks
        ) as net:
            self._deadline_s = time.monotonic() + self.experiment.wall_time_s - net.up_s
            self.results.emulation = net.emulation
            self.results.without = net.does_without
            self.calibrate(net)
            isolation = try_isolation(net)
            self.tell(
                "sites are isolated"
                if isolation["isolated"]
                else f"sites leak: {'; '.join(isolation['leaks'])}"
            )
            first = self.results.repetition(0)
            first.events.append(EventRow.model_validate({"at_s": 0.0, "event": "isolation", **isolation}))
            for model in self.experiment.models:
                self.one_model(net, model)
        self.results.network_s = {"up": round(net.up_s, 2), "down": round(net.down_s, 2)}

    def calibrate(self, net: Network) -> None:
        from prfaas_testbed.network import verdict as network_verdict

        self.tell("calibrating every link, each way")
        rows = net.calibrate()
        self.results.calibration += [CalibrationRow.model_validate(row.as_row()) for row in rows]
        for row in rows:
            loss = "-" if row.measured_loss is None else f"{row.measured_loss:.3%}"
            self.tell(
                f"  {row.direction}: RTT {row.measured_rtt_ms} ms (wanted {row.wanted_rtt_ms:g}), rate "
                f"{row.measured_rate_mbps} Mbit/s (wanted {row.wanted_rate_mbps}), loss {loss} "
                f"(wanted {row.wanted_loss:.3%}): {'inside' if row.inside else 'OUTSIDE'}"
            )
        missed = network_verdict(rows)
        if missed and self.experiment.spoilt == "again":
            raise CalibrationMissed(
                f"the network isn't as asked for, the load was not run: {' | '.join(missed)}"
            )

    def one_model(self, net: Network, model: ModelChoice) -> None:
        folder = self.work(model)
        # Of an attempt that was interrupted: its digests would stand for some that are missing now.
        shutil.rmtree(folder, ignore_errors=True)
        fleet = Fleet(net, self.experiment, model, folder, self.tell, self.scale)
        try:
            began_s = time.monotonic()
            self.tell(f"{model.name}: starting {self._what(fleet)}")
            fleet.start()
            self.tell(f"{model.name}: all servers ready after {time.monotonic() - began_s:.0f} s")
            requests = plan(self.experiment, self.real, self.experiment.seed)
            self.warm_up(net, fleet, max(len(request.tokens) for request in requests))
            probes = [probe_of(requests, self.real)] if self.experiment.rounds else []
            if fleet.plain is not None:
                self.plain_answers(net, fleet, [*requests, *probes])
            if self.experiment.capacity is not None:
                self.search(net, fleet, self.experiment.capacity)
            elif self.experiment.rounds:
                play_rounds(self, net, fleet, requests, probes[0])
            else:
                for index in range(self.experiment.repetitions):
                    self.repetition(net, fleet, requests, index)
            for control in self.experiment.controls:
                if control.model in (None, model.name):
                    try_control(self, net, fleet, control)
        finally:
            fleet.stop()

    def work(self, model: ModelChoice) -> Path:
        """Where a model's servers write."""
        return self.folder / "work" / model.name

    def _what(self, fleet: Fleet) -> str:
        kinds = "real SGLang servers" if self.real else "profiled instances"
        names = ", ".join(name for i in self.experiment.instances for name in i.names())
        return f"{kinds} {names}" + (" and a plain one" if self.experiment.baseline else "")

    # Loads

    def warm_up(self, net: Network, fleet: Fleet, longest_tokens: int) -> None:
        """First requests compile kernels, open connections and touch memory: none of those that count is the
        first. A real server's first long prompt takes half as long again as the next."""
        rng = Random(self.experiment.seed ^ 0x77)
        lengths = [K_WARM_TOKENS, 2 * K_WARM_TOKENS, *([longest_tokens] if self.real else [])]
        warm = [
            Planned(f"warm{i}", 0.1 * i, [rng.randrange(4, 900) for _ in range(tokens)], 4)
            for i, tokens in enumerate(lengths)
        ]
        shots, _ = direct_shots(warm, fleet, self.real, rng, self.experiment.request_timeout_s)
        if fleet.plain is not None:
            plain = one_server_shots(warm, fleet.plain.url, self.real, self.experiment.request_timeout_s)
            shots += [Shot(f"p-{s.id}", s.at_s, s.body, s.targets, s.timeout_s) for s in plain]
        answers, _, _ = self.send(net, fleet, shots, "warm", quiet=True)
        failed = [answer.error for answer in answers if answer.error]
        if failed:
            raise PrfaasError(f"the servers are up but don't answer: {failed[0]}")

    def plain_answers(self, net: Network, fleet: Fleet, requests: list[Planned]) -> None:
        assert fleet.plain is not None
        self.tell(f"{fleet.model.name}: {len(requests)} requests to the plain server")
        shots = one_server_shots(requests, fleet.plain.url, self.real, self.experiment.request_timeout_s)
        answers, start_s, _ = self.send(net, fleet, shots, "plain")
        rows = rows_of(
            answers, requests, fleet.model.name, start_s, {}, {}, lambda tokens: None, fleet.plain.site
        )
        self.results.baseline += rows

    def repetition(self, net: Network, fleet: Fleet, requests: list[Planned], index: int) -> None:
        """One valid pass: void ones are kept apart and run again. Raises TooBusy when it is void again and
        again."""
        for attempt in range(1 + K_VOID_AGAIN):
            name = f"rep{index}-{attempt}"
            of = "" if self.experiment.capacity else f" of {self.experiment.repetitions}"
            self.tell(
                f"{fleet.model.name}: repetition {index + 1}{of}, {len(requests)} requests"
                + (f" (attempt {attempt + 1})" if attempt else "")
            )
            if index or attempt:
                empty(net, fleet, self.tell)
            found = self.attempt(net, fleet, requests, name, self.experiment.timeline)
            if found.void is None or self.experiment.spoilt == "keep":
                break
            self.tell(f"{fleet.model.name}: repetition {index + 1} is void: {found.void}")
            row = {"index": index, "attempt": attempt, "model": fleet.model.name, "reason": found.void}
            self.results.void.append(
                Row.model_validate(
                    {
                        **row,
                        "requests": [r.model_dump(exclude={"output_ids", "logprobs"}) for r in found.rows],
                        "watch": [e.model_dump() for e in found.events if e.event == "watch"],
                    }
                )
            )
        else:
            raise TooBusy(
                f"machine too busy: repetition {index + 1} of {fleet.model.name} was void each time: "
                f"{found.void}"
            )
        self.keep(fleet, found, index)

    def attempt(
        self,
        net: Network,
        fleet: Fleet,
        requests: list[Planned],
        name: str,
        planned: Sequence[Event],
        then: Callable[[float], list[EventRow]] = lambda zero_s: [],
    ) -> Attempt:
        """The requests once, with trouble beside them. `then` is called when all are over and nothing is
        broken any more, with the load's zero."""
        rooms = Random(f"{self.experiment.seed}/{fleet.model.name}/{name}")
        limit_s = self.experiment.request_timeout_s
        if fleet.router is None:
            shots, where = direct_shots(requests, fleet, self.real, rooms, limit_s)
        else:
            shots, where = one_server_shots(requests, fleet.router.url, self.real, limit_s), {}
        watch, timeline = Observer(net, fleet), Timeline(planned, net, fleet)
        captures = Captures(self.experiment.captures, net, fleet.folder, K_PUMP_PORT)
        timeline.prepare()
        watch.begin()
        answers, start_s, client = self.send(net, fleet, shots, name, beside=(timeline, captures))
        events = timeline.finish()
        events += then(start_s)
        links, seen, void = watch.end(start_s)
        timeline.check()
        events += captures.finish()
        moved = read_moved(fleet.digests) if fleet.digests.exists() else {}
        if fleet.router is not None:
            where = where_of(answers, fleet.servers, moved)
        home = fleet.client_site
        rows = rows_of(answers, requests, fleet.model.name, start_s, where, moved, self._wanted(fleet), home)
        load = {
            "at_s": 0.0, "event": "load", "requests": len(requests), "client_cpu_share": client.cpu_share
        }  # fmt: skip
        return Attempt(rows, links, [*events, EventRow.model_validate(load), *seen], void)

    def keep(self, fleet: Fleet, found: Attempt, index: int) -> None:
        """An attempt's rows as those of repetition `index`, each answer compared with the plain server's."""
        target = self.results.repetition(index)
        for event in found.events:
            event.__pydantic_extra__ = {**(event.model_extra or {}), "model": fleet.model.name}
        for link in found.links:
            link.__pydantic_extra__ = {**(link.model_extra or {}), "model": fleet.model.name}
        plain = {(row.model, row.id): row for row in self.results.baseline}
        for request in found.rows:
            request.tokens_equal = equal_tokens(request, plain.get((request.model, request.id)))
        target.requests += found.rows
        target.links += found.links
        target.events += sorted(found.events, key=lambda event: event.at_s)

    def search(self, net: Network, fleet: Fleet, choice: Capacity) -> None:
        """Trials at rising and halving rates, a repetition each; see capacity.py for the rule."""
        search = Search(rate_of(self.experiment.workload), choice)
        index = 0
        while (rate := search.next_rps()) is not None:
            workload = with_rate(self.experiment.workload, rate, choice.duration_s)
            scaled = self.experiment.model_copy(update={"workload": workload})
            self.repetition(net, fleet, plan(scaled, self.real, self.experiment.seed + index), index)
            trial = self.results.repetition(index)
            share = slo_share(trial.requests, self.experiment.slo_ttft_s or 0.0, fleet.model.name)
            search.tell(rate, share)
            row = {
                "at_s": 0.0, "event": "capacity", "rate_rps": round(rate, 3), "slo_share": round(share, 4),
                "held_rps": search.held_rps, "broken_rps": search.broken_rps, "rule": search.rule(),
                "model": fleet.model.name,
            }  # fmt: skip
            trial.events.append(EventRow.model_validate(row))
            self.tell(f"{fleet.model.name}: {rate:.2f} requests/s: {share:.1%} within the SLO")
            index += 1

    def send(
        self,
        net: Network,
        fleet: Fleet,
        shots: list[Shot],
        name: str,
        quiet: bool = False,
        beside: tuple[Timeline | Captures, ...] = (),
    ) -> tuple[list[Answer], float, Client]:
        self._check_time()
        # Not in the servers' own folder: a disk that is full is theirs.
        folder = fleet.folder.with_name(f"{fleet.model.name}-load")
        client = Client(net.sites[fleet.client_site], folder, name)
        killed = any(isinstance(thing, Timeline) and thing.kills for thing in beside)

        def poll(done: int) -> None:
            self._check_time()
            if not killed:
                fleet.check_alive()
            if not quiet:
                self.tell(f"{fleet.model.name}: {done} of {len(shots)} answered")

        if not killed:
            fleet.check_alive()
        try:
            client.start(shots)
            for thing in beside:
                thing.start(client.start_s)
            answers = client.finish(poll, every_s=3.0)
        except BaseException:
            for thing in beside:
                thing.abandon()
            raise
        finally:
            client.stop()
        # Requests that failed because a server couldn't write say nothing about the system.
        require_space(self.folder)
        return answers, client.start_s, client

    def _wanted(self, fleet: Fleet) -> Callable[[int], int | None]:
        if self.real:
            model = fleet.tiny_model()
            return lambda tokens: wanted_bytes(tokens, None, model)
        if fleet.model.profile is None:
            return lambda tokens: None
        profile = find_profile(fleet.model.profile, K_TOPOLOGIES).scaled(self.scale)
        return lambda tokens: wanted_bytes(tokens, profile, None)

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline_s:
            raise PrfaasError(
                f"the run has taken its declared {self.experiment.wall_time_s:g} s and was stopped"
            )
