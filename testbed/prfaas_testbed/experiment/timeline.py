"""The timeline of an experiment on the running network: each event at its time, and the record of when it
was.

Every step is planned beforehand (pure), so that an event with an end is two steps. A thread sleeps to each
step's time; slow steps (a server's start) run beside it and don't delay the next.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prfaas.config.experiment import (
    CrossTraffic,
    CutStream,
    Event,
    FillDisk,
    Flap,
    Hostile,
    Kill,
    LinkDown,
    ReplaceCertificate,
    SetLink,
    StepClock,
    directed,
)
from prfaas.config.run import EventRow
from prfaas.config.topology import Impairments, LinkChange
from prfaas.model.errors import PrfaasError
from prfaas.pump import keys
from prfaas.pump_client.launch import connect, peer_of
from prfaas_testbed.experiment.fleet import K_AUTHORITY_DAYS, K_CERTIFICATE_DAYS, K_PUMP_PORT, Fleet
from prfaas_testbed.experiment.servers import Server
from prfaas_testbed.experiment.sites import cut_streams
from prfaas_testbed.network.disk import empty_disk, fill_disk

if TYPE_CHECKING:
    from prfaas_testbed.network import Network
    from prfaas_testbed.network.traffic import CrossTraffic as CrossTrafficRunning


K_BESIDE = CutStream | Kill | FillDisk | ReplaceCertificate | Hostile
"""What takes time, and must not hold up the next."""
K_OTHER_PUMP_S = 5.0  # it took the port first, and answers soon
K_HOSTILE_S = 20.0  # it waits for live segments, and sends


@dataclass(frozen=True)
class Step:
    """One thing to do at one time."""

    at_s: float
    event: Event
    phase: str
    """`begin` or `end`."""


def steps_of(events: Sequence[Event]) -> list[Step]:
    """In order of time; ends of one event come before beginnings at the same time."""
    steps: list[Step] = []
    for event in events:
        if isinstance(event, Flap):
            for i in range(event.times):
                down_s = event.at_s + i * (event.on_s + event.off_s)
                steps += [Step(down_s, event, "begin"), Step(down_s + event.off_s, event, "end")]
            continue
        steps.append(Step(event.at_s, event, "begin"))
        if isinstance(event, Kill):
            length_s = event.restart_after_s
        elif isinstance(event, SetLink | LinkDown | CrossTraffic | FillDisk | StepClock):
            length_s = event.for_s
        else:
            length_s = None
        if length_s is not None:
            steps.append(Step(event.at_s + length_s, event, "end"))
    return sorted(steps, key=lambda step: (step.at_s, step.phase == "begin"))


def runs_beside(step: Step) -> bool:
    """Traffic is begun at once, so that its end, which waits for its report, never overtakes that."""
    if isinstance(step.event, CrossTraffic):
        return step.phase == "end"
    return isinstance(step.event, K_BESIDE)


class Timeline:
    """`start` with the load's zero; `finish` ends what is still on and gives the rows."""

    def __init__(
        self, events: Sequence[Event], net: Network, fleet: Fleet, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps, self._net, self._fleet, self._now = steps_of(events), net, fleet, now
        self._rows: list[EventRow] = []
        self._changed: set[str] = set()
        self._strangers: set[Path] = set()
        """Folders of keys that hold a certificate which nobody trusts."""
        self._before: dict[tuple[int, str], Impairments] = {}
        self._traffic: dict[int, CrossTrafficRunning] = {}
        self._hostile: dict[int, subprocess.Popen[str]] = {}
        self._stopped = threading.Event()
        self._abandoned = False
        self._lock = threading.Lock()
        self._beside: list[threading.Thread] = []
        self._zero_s = 0.0
        self._thread = threading.Thread(target=self._run, name="timeline")

    @property
    def kills(self) -> bool:
        """Whether servers or pumps are away for a while, as planned."""
        return any(isinstance(step.event, Kill) for step in self._steps)

    def prepare(self) -> None:
        """What would disturb the load if it were done while that runs."""
        self._net.prepare_changes(
            link
            for step in self._steps
            if isinstance(step.event, SetLink | LinkDown | Flap)
            for link in directed(step.event.link)
        )
        for step in self._steps:
            event = step.event
            if isinstance(event, CrossTraffic) and step.phase == "begin":
                self._traffic[id(event)] = self._net.prepare_traffic(
                    event.source, event.target, event.kind, event.rate_mbps, event.streams
                )

    def start(self, zero_s: float) -> None:
        self._zero_s = zero_s
        for step in self._steps:
            if isinstance(step.event, Hostile):
                # Before its time: its imports take a second, and it waits for the time itself.
                self._hostile[id(step.event)] = self._start_hostile(step, step.event)
        self._thread.start()

    def check(self) -> None:
        """Once nothing is measured any more. Raises RouterError if a link isn't what it was last told to
        be.
        """
        if self._changed:
            self._net.check_links()

    def finish(self) -> list[EventRow]:
        """Don't begin anything new, end what was begun, and say all that happened."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        for thread in self._beside:
            thread.join()
        for process in self._hostile.values():
            if process.poll() is None:
                process.kill()
            process.communicate()
        for folder in self._strangers:
            # Whatever comes next begins as this did.
            keys.rotate_site(folder, days=K_CERTIFICATE_DAYS, now=datetime.datetime.now(datetime.UTC))
        with self._lock:
            return sorted(self._rows, key=lambda row: row.at_s)

    def abandon(self) -> None:
        """The run is over: nothing more is begun, mended or waited for. What was begun goes down with the
        servers and the network."""
        self._abandoned = True
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()
        for process in self._hostile.values():
            process.kill()
            process.wait()  # a thread beside may be reading what it says

    def _run(self) -> None:
        for step in self._steps:
            left_s = self._zero_s + step.at_s - self._now()
            stopped = self._stopped.wait(max(0.0, left_s))
            if self._abandoned:
                return
            if stopped and step.phase == "begin":
                self._record(step, self._now(), skipped="the load ended before it")
                continue
            if runs_beside(step):
                # A daemon: one that is abandoned may wait for a server's start for a minute yet.
                thread = threading.Thread(target=self._do, args=(step,), daemon=True)
                self._beside.append(thread)
                thread.start()
            else:
                self._do(step)

    def _do(self, step: Step) -> None:
        event = step.event
        try:
            if isinstance(event, SetLink | LinkDown | Flap):
                self._link(step, event)
            elif isinstance(event, CutStream):
                began_s = self._now()
                found = cut_streams(self._net, event.source, event.target, K_PUMP_PORT, event.streams)
                # It waits for a stream that carries bytes: its time is the cut, its lag is of its start.
                cut_s = self._now()
                self._record(step, cut_s, began_s, waited_ms=_ms(cut_s - began_s), **found)
            elif isinstance(event, Kill):
                self._kill(step, event)
            elif isinstance(event, CrossTraffic):
                self._cross(step, event)
            elif isinstance(event, Hostile):
                self._attack(step, event)
            elif isinstance(event, FillDisk):
                self._disk(step)
            elif isinstance(event, StepClock):
                assert self._fleet.clocks is not None  # the fleet was made with this event known
                seconds = event.step_s if step.phase == "begin" else 0
                self._fleet.clocks.step(event.site, seconds)
                self._record(step, self._now(), site=event.site, seconds=seconds)
            else:
                folder = self._fleet.folder / "keys" / event.site
                self._replace(step, event, folder)
        except (PrfaasError, OSError, subprocess.SubprocessError) as error:
            self._record(step, self._now(), failed=str(error))

    def _link(self, step: Step, event: SetLink | LinkDown | Flap) -> None:
        for link in directed(event.link):
            key = (id(event), link)
            if not isinstance(event, SetLink):
                change = LinkChange(down=step.phase == "begin")
            elif step.phase == "begin":
                self._before[key] = self._net.links[link]
                change = event.set
            else:
                # The state is as emulated, a change as the topology has it.
                change = self._before[key].undoing(event.set).divided(1 / self._net.factor)
            applied = self._net.apply(link, change, read_back=False)
            self._changed.add(link)
            self._record(step, applied.at_s, link=link, change=change.model_dump(exclude_unset=True))

    def _kill(self, step: Step, event: Kill) -> None:
        server = self._fleet.named(event.instance)
        process = self._fleet.pumps[server.site] if event.what == "pump" else server.process
        # After an earlier kill a server may have started a pump in its place: it is that one then.
        other = self._pump_at(server) if event.what == "pump" else None
        pid = other or process.pid
        at_s = self._now()
        said: dict[str, Any] = {"instance": event.instance, "what": event.what}
        if event.signal == "freeze":
            if pid is not None:
                os.kill(pid, signal.SIGSTOP if step.phase == "begin" else signal.SIGCONT)
            said |= {"signal": "SIGSTOP" if step.phase == "begin" else "SIGCONT"}
        elif step.phase == "begin":
            if event.what == "pump" and event.restart_after_s is None:
                self._fleet.given_up.add(server.site)
            if other is not None and other != process.pid:
                _kill_other(other)
            process.kill()
            said |= {"signal": "SIGKILL", "dead_ms": _ms(self._now() - at_s)}
        else:
            process.start()
            try:
                process.wait_ready(lambda line: None)
            except PrfaasError:
                # A server that missed its pump may have started one first. Both can be on the way.
                if event.what != "pump" or not self._pump_answers(server):
                    raise
                self._fleet.given_up.add(server.site)
                said |= {"by": "a server that missed it"}
            said |= {"ready_s": round(self._now() - at_s, 3)}
        self._record(step, at_s, **said)

    def _pump_answers(self, server: Server) -> bool:
        end_s = time.monotonic() + K_OTHER_PUMP_S
        while time.monotonic() < end_s:
            if self._pump_at(server) is not None:
                return True
            time.sleep(0.05)
        return False

    def _pump_at(self, server: Server) -> int | None:
        """The process that serves the site as its pump, whoever started it; None: nobody does."""
        # A site has a /run of its own, which its processes show.
        path = self._fleet.control_socket(server.site)
        sock = connect(Path(f"/proc/{server.process.pid}/root") / path.relative_to("/"))
        if sock is None:
            return None
        with sock:
            return peer_of(sock)[0]

    def _disk(self, step: Step) -> None:
        disk, at_s = self._fleet.folder, self._now()
        if step.phase == "begin":
            self._record(step, at_s, filled_bytes=fill_disk(disk))
        else:
            empty_disk(disk)
            self._record(step, at_s)

    def _cross(self, step: Step, event: CrossTraffic) -> None:
        traffic = self._traffic[id(event)]
        said: dict[str, Any] = {"kind": event.kind, "source": event.source, "target": event.target}
        if step.phase == "begin":
            traffic.begin()
            assert traffic.begun_s is not None
            self._record(step, traffic.begun_s, **said)
            return
        at_s = self._now()  # what follows is the report of what arrived
        if traffic.begun_s is None:
            traffic.stop()
            self._record(step, at_s, skipped="the load ended before it", **said)
            return
        found = traffic.stop()
        said["mbps"] = found["mbps"]
        if found["error"]:
            said["failed" if traffic.ended_early else "error"] = found["error"]
        self._record(step, at_s, **said)

    def _start_hostile(self, step: Step, event: Hostile) -> subprocess.Popen[str]:
        site, target = self._net.sites[event.source], self._net.sites[event.target]
        words = ["--device", site.device, "--target", target.address, "--port", str(K_PUMP_PORT)]
        words += ["--packets", str(event.packets), "--at", str(self._zero_s + step.at_s)]
        return site.popen(
            [sys.executable, "-m", "prfaas_testbed.experiment.hostile", event.kind, *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def _attack(self, step: Step, event: Hostile) -> None:
        process = self._hostile[id(event)]
        try:
            out, err = process.communicate(timeout=K_HOSTILE_S)
        except subprocess.TimeoutExpired:
            raise PrfaasError(f"hostile {event.kind}: not sent within {K_HOSTILE_S:g} s") from None
        if process.returncode:
            said = (err.strip().splitlines() or ["failed"])[-1]
            raise PrfaasError(f"hostile {event.kind}: {said}")
        found = json.loads(out)
        # It waits for live segments to stand in for: its time is when it began to look.
        self._record(
            step, found["began_s"], kind=event.kind, source=event.source, target=event.target,
            packets=found["packets"], connections=found["connections"],
            live_segments_seen=found["live_segments_seen"],
            sent_s=round(found["sent_s"] - self._zero_s, 4),
        )  # fmt: skip

    def _replace(self, step: Step, event: ReplaceCertificate, folder: Path) -> None:
        now = datetime.datetime.now(datetime.UTC)
        if event.trusted:
            self._strangers.discard(folder)
            keys.rotate_site(folder, days=K_CERTIFICATE_DAYS, now=now)
        else:
            self._strangers.add(folder)
            days = {"days": K_CERTIFICATE_DAYS, "authority_days": K_AUTHORITY_DAYS}
            with tempfile.TemporaryDirectory(prefix="stranger-", dir=folder.parent) as stranger:
                keys.create_site(Path(stranger) / "site", event.site, now=now, **days)
                os.replace(Path(stranger) / "site" / keys.K_SITE_FILE, folder / keys.K_SITE_FILE)
        self._record(step, self._now(), site=event.site, trusted=event.trusted)

    def _record(self, step: Step, at_s: float, began_s: float | None = None, **fields: Any) -> None:
        """`at_s`: when it happened; `began_s`: when it was begun, where it then waited for something."""
        name = step.event.do if step.phase == "begin" else f"{step.event.do}_end"
        row: dict[str, Any] = {
            "at_s": round(at_s - self._zero_s, 4),
            "event": name,
            "planned_s": step.at_s,
            **fields,
        }
        lag_ms = _ms((at_s if began_s is None else began_s) - self._zero_s - step.at_s)
        if step.phase == "end" and lag_ms < 0 and self._stopped.is_set():
            row["early"] = "the load ended before it"  # and it with the load, so that has no lag
        elif "skipped" not in row:
            row["lag_ms"] = lag_ms
        with self._lock:
            self._rows.append(EventRow.model_validate(row))


def _kill_other(pid: int) -> None:
    """A process that isn't our child, until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        ended = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(ended, signal.SIGKILL)
            select.select([ended], [], [], K_OTHER_PUMP_S)
        finally:
            os.close(ended)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)
