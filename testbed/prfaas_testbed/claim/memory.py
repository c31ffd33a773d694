"""Piece `memory`: what router, pumps and instances hold while load goes on, on this machine's loopback."""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from prfaas.config.experiment import Experiment
from prfaas.config.topology import Topology, load_topology
from prfaas.figures import new_figure, save
from prfaas.transfer.receiving import K_REMEMBERED
from prfaas_testbed.claim.judge import Goal, Piece, table
from prfaas_testbed.claim.pumps_alone import alone
from prfaas_testbed.claim.runs import K_TOPOLOGIES, parts
from prfaas_testbed.experiment.cost import spent
from prfaas_testbed.experiment.fleet import Fleet
from prfaas_testbed.experiment.load import Client, one_server_shots, plan

if TYPE_CHECKING:
    from prfaas_testbed.network import Network

K_EXPERIMENT = "claim-memory"
K_SAMPLE_S = 10.0
K_SETTLED = 0.5  # of the time: before, caches and pools fill
K_GROWTH_MIB = 5.0  # an hour, for each process
K_JUDGED = ("router", "pump")
K_MIB = 2.0**20


@dataclass(frozen=True)
class HereSite:
    """A site that is this machine under another loopback address."""

    name: str
    address: str

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(list(argv), start_new_session=True, **options)


class Here:
    """As much of a Network as servers and a load ask for. Sites are joined by loopback."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.sites = {
            name: HereSite(name, f"127.41.{place}.1") for place, name in enumerate(topology.sites, start=1)
        }

    def path(self, source: str, target: str) -> list[str]:
        return [f"{source}->{target}"]


def measure(repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Each repetition is the experiment's load once more on servers that stay."""
    ((_, experiment),) = parts(K_EXPERIMENT)
    rows = played(experiment, repetitions, say)
    say("two pumps alone")
    bounded = all(instance.limits.cache_tokens for instance in experiment.instances)
    load_s = experiment.workload.duration_s
    return {"rows": rows, "load_s": load_s, "caches_bounded": bounded, "alone": alone()}


def played(experiment: Experiment, repetitions: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row a process and sample; the first row of a repetition carries what was answered."""
    net = cast("Network", Here(load_topology(experiment.network, K_TOPOLOGIES / "networks")))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="prfaas-memory-") as held:
        fleet = Fleet(net, experiment, experiment.models[0], Path(held) / "servers", say)
        try:
            fleet.start()
            begun_s, over = time.monotonic(), threading.Event()
            sampler = threading.Thread(target=_sample, args=(fleet, rows, begun_s, over))
            sampler.start()
            try:
                for repetition in range(repetitions):
                    answered, failed = _load(net, fleet, experiment, repetition, Path(held) / "load")
                    row = {"repetition": repetition, "name": "load", "at_s": time.monotonic() - begun_s}
                    rows.append({**row, "answered": answered, "failed": failed})
                    say(f"repetition {repetition + 1}: {answered} answered, {failed} failed")
            finally:
                over.set()
                sampler.join()
        finally:
            fleet.stop()
    return rows


def _load(
    net: Network, fleet: Fleet, experiment: Experiment, repetition: int, folder: Path
) -> tuple[int, int]:
    """(answered, failed) of one repetition, whose prompts no other has."""
    requests = plan(experiment, False, experiment.seed + repetition)
    assert fleet.router is not None
    shots = one_server_shots(requests, fleet.router.url, False, experiment.request_timeout_s)
    client = Client(net.sites[fleet.router.site], folder, f"load{repetition}")
    try:
        client.start(shots)
        answers = client.finish(lambda done: fleet.check_alive(), every_s=5.0)
    finally:
        client.stop()
    failed = sum(answer.error is not None for answer in answers)
    for path in folder.iterdir():
        path.unlink()
    return len(answers) - failed, failed + len(requests) - len(answers)


def _sample(fleet: Fleet, rows: list[dict[str, Any]], begun_s: float, over: threading.Event) -> None:
    while True:
        at_s = time.monotonic() - begun_s
        for name, one in spent(fleet).items():
            rows.append(
                {"repetition": 0, "name": name, "role": one.role, "at_s": at_s, "rss_bytes": one.rss_bytes,
                 "cpu_s": one.cpu_s}
            )  # fmt: skip
        if over.wait(K_SAMPLE_S):
            return


@dataclass(frozen=True)
class Held:
    """One process over the whole load."""

    name: str
    first_mib: float
    settled_mib: float
    last_mib: float
    growth_mib: float
    """An hour, over the time after it has settled: the slope of the least squares."""
    cores: float


def held(data: dict[str, Any]) -> list[Held]:
    """A row a process, by name."""
    found = []
    rows = [row for row in data["rows"] if row["name"] != "load"]
    for name in sorted({row["name"] for row in rows}):
        ours = [row for row in rows if row["name"] == name]
        at_s = np.array([row["at_s"] for row in ours])
        mib = np.array([row["rss_bytes"] for row in ours]) / K_MIB
        late = at_s >= at_s[0] + K_SETTLED * (at_s[-1] - at_s[0])
        slope = float(np.polyfit(at_s[late], mib[late], 1)[0]) if late.sum() > 2 else float("nan")
        span_s = max(1e-9, at_s[-1] - at_s[0])
        found.append(
            Held(
                name, float(mib[0]), float(mib[late][0]), float(mib[-1]), 3600 * slope,
                (ours[-1]["cpu_s"] - ours[0]["cpu_s"]) / span_s,
            )
        )  # fmt: skip
    return found


def goals(data: dict[str, Any]) -> list[Goal]:
    """No process grows, none failed."""
    found = [one for one in held(data) if one.name.startswith(K_JUDGED)]
    worst = max(found, key=lambda one: one.growth_mib)
    loads = [row for row in data["rows"] if row["name"] == "load"]
    minutes = max(row["at_s"] for row in data["rows"]) / 60
    failed = sum(row["failed"] for row in loads)
    return [
        Goal(
            f"router and pumps grow by at most {K_GROWTH_MIB:g} MiB an hour of load, once settled",
            f"most: {worst.name} {worst.growth_mib:+.1f} MiB an hour, over the second half of {minutes:.0f} "
            "minutes",
            worst.growth_mib <= K_GROWTH_MIB,
            _why(data),
        ),
        Goal(
            "every request of that load answered",
            f"{sum(row['answered'] for row in loads)} answered, {failed} failed",
            failed == 0,
        ),
    ]


def _why(data: dict[str, Any]) -> str:
    """What of the growth two pumps alone have as well, at as many transfers an hour; empty without them."""
    if not data.get("alone"):
        return ""
    loads = [row for row in data["rows"] if row["name"] == "load"]
    an_hour = 3600 * sum(row["answered"] for row in loads) / max(row["at_s"] for row in loads)
    first = data["alone"][0]
    until = max(
        (row for row in data["alone"] if 0 < row["transfers"] <= K_REMEMBERED),
        key=lambda row: row["transfers"],
    )
    grown_mib = (until["receiver_bytes"] - first["receiver_bytes"]) / K_MIB
    known_mib = grown_mib / until["transfers"] * an_hour
    minutes = 60 * K_REMEMBERED / an_hour
    return (
        f"a pump that receives remembers ended transfers, up to {K_REMEMBERED:,} of them, which this load "
        f"reaches after {minutes:.0f} minutes; two pumps alone grow by {known_mib:.1f} MiB in an hour of as "
        "many (below), and no further. What else there is comes in steps (the figure): a stream more, where "
        "packets were lost, holds up to 2 MiB at each end, and before be4df6d3 the table of what is "
        "remembered was made anew, 0.6 MiB each time"
    )


def tell(data: dict[str, Any]) -> str:
    """A table of processes."""
    lines = [
        [
            one.name, f"{one.first_mib:.1f}", f"{one.settled_mib:.1f}", f"{one.last_mib:.1f}",
            f"{one.growth_mib:+.2f}", f"{100 * one.cores:.1f}",
        ]
        for one in held(data)
    ]  # fmt: skip
    head = ["process", "MiB at the start", "at half-time", "at the end", "MiB an hour after", "% of a core"]
    came = sum(row["answered"] + row["failed"] for row in data["rows"] if row["name"] == "load")
    load_s = data["repetitions"] * data["load_s"]
    caches = K_BOUNDED if data.get("caches_bounded") else K_UNBOUNDED
    told = K_TOLD.format(requests=came, minutes=load_s / 60, rate_rps=came / load_s, caches=caches)
    return table(head, lines) + told + _alone(data.get("alone", []))


def _alone(rows: list[dict[str, Any]]) -> str:
    """Two pumps with nothing but transfers: the table that tells a limit from a leak."""
    if not rows:
        return ""
    first = rows[0]
    lines = [
        [
            f"{row['transfers']:,}", f"{row['at_s']:.0f}",
            *(f"{(row[name] - first[name]) / K_MIB:+.2f}" for name in ("receiver_bytes", "sender_bytes")),
        ]
        for row in rows[1:]
    ]  # fmt: skip
    head = ["transfers ended", "after, s", "receiving pump, MiB", "sending pump, MiB"]
    return K_ALONE + table(head, lines)


K_TOLD = """
Router, pumps and profiled instances of two sites on this machine's loopback; {requests:,} requests of 64 to
4,096 tokens in {minutes:.0f} minutes, {rate_rps:.1f} a second, no two with a common prefix; pumps with
mutual TLS, their links estimated. Nothing is started again in between. Growth is told by the hour of this
load. Resident memory of a process with its descendants, every ten seconds. {caches} Real SGLang servers are
not among them: their memory is seen, over shorter loads, in the records of their own experiments.
"""
K_BOUNDED = """The instances' prefix caches
are full after a minute or two, and so is what the router knows of them; instances aren't judged."""
K_UNBOUNDED = """The instances' prefix caches
have no limit here, so that prefill's grow with every prompt; they aren't judged."""


K_ALONE = """
Whether a pump grows to a limit or without one takes more transfers than that load has. Two pumps alone on
loopback, transfers of 256 KiB one after the other, each under a lease of its own; what each holds of its own
more than after the first. (That nothing is left of transfers that end, well or badly, of servers, peers and
strangers is counted by object and table in `tests/loopback/pump/test_holds.py`.)

"""


def draw(data: dict[str, Any], folder: Path) -> list[str]:
    """Resident memory over time, of each process."""
    figure, (panel,) = new_figure(1, 1, width=6.4, height=3.2)
    drawn: list[list[Any]] = []
    rows = [row for row in data["rows"] if row["name"] != "load"]
    for name in sorted({row["name"] for row in rows}):
        ours = [row for row in rows if row["name"] == name]
        panel.plot([row["at_s"] / 60 for row in ours], [row["rss_bytes"] / K_MIB for row in ours], label=name)
        drawn += [[name, round(row["at_s"], 1), row["rss_bytes"]] for row in ours]
    panel.set(xlabel="Minutes of load", ylabel="Resident, MiB", ylim=(0, None))
    panel.legend(loc="lower right", ncols=2)
    paths = save(figure, folder, "memory", ["process", "s", "resident bytes"], drawn)
    return [path.name for path in paths if path.suffix == ".png"]


PIECE = Piece("memory", "Memory over load", measure, goals, draw, tell, world="loopback")
