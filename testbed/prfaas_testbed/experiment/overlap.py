"""What a wide-area network adds to the first token, by when KV is sent: layer by layer, chunk by chunk, at
the end.

Real SGLang on CPU: one prefill server in `east`, a decode server beside it and one in `west`. A request is
asked once in each site, in turns, one at a time, with new prompts of the same length; the difference of
the medians is what the distance costs. It may be a round trip, the time on the wire of what is left when
prefill ends, and 10 ms: what is left with `layer` is the last layer's part of the last chunk. With `end`
the same bound must break, or the link was too fast for the check to mean anything.

Prefill has a core of its own, as it has its own GPU elsewhere: beside the pumps and the emulated network on
the same core a transfer would slow down the very prefill that it hides behind. It varies all the same. So
the *tail* of each request between the sites is measured, too: from when SGLang handed the last chunk over
until the last byte was in decode's pages, by the servers' own rows and one clock. It has no prefill in it,
and half a round trip.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import yaml

from prfaas.config.experiment import Experiment, Instance
from prfaas.config.topology import Topology
from prfaas.model.errors import PrfaasError
from prfaas.sglang.verify import read_rows
from prfaas_testbed.experiment.cores import OwnCore, scheduler_of
from prfaas_testbed.experiment.fleet import K_MODELS_DIR, Fleet
from prfaas_testbed.experiment.profiling import undisturbed
from prfaas_testbed.experiment.servers import Server
from prfaas_testbed.experiment.sites import write_json
from prfaas_testbed.instances.models import K_MODELS
from prfaas_testbed.instances.sglang_server import sglang_python

if TYPE_CHECKING:
    from prfaas_testbed.network import Network, Site

K_MODEL = "wide"
K_LAYERS = 8
K_CHUNK_TOKENS = 1024
K_MODES = ("layer", "chunk", "end")
K_LENGTHS = (512, 1024, 2048, 3072)
K_OUTPUT_TOKENS = 2
K_WARM_ROUNDS = 1
K_SLACK_S = 0.010
K_LEAST_SHARE = 0.5
"""Of prefill's time that KV must be on the wire for the check to mean anything."""
K_WIRE_SHARE = 0.95
"""What of a link's rate is left to payload by headers of Ethernet, IP, TCP and TLS."""
K_NEAR, K_FAR, K_PREFILL = "near", "far", "prefill"

Progress = Callable[[str], None]


@dataclass
class Found:
    """Raw values: a row a request, with `overlap`, `round`, `tokens`, `where` (near, far), `ttft_s`,
    `e2e_s`."""

    calibration: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    own_core: bool = True
    """Whether prefill computed on a core that nothing else used."""


@dataclass(frozen=True)
class Verdict:
    """One mode at one length. Times are medians, in seconds."""

    overlap: str
    tokens: int
    near_s: float
    far_s: float
    added_s: float
    bound_s: float
    tail_s: float
    """Of requests between the sites."""
    tail_bound_s: float
    wire_share: float
    """Time on the wire of the request's KV over the first token's time in one site."""
    requests: int

    @property
    def within(self) -> bool:
        return self.added_s <= self.bound_s

    @property
    def tail_within(self) -> bool:
        return self.tail_s <= self.tail_bound_s


def last_piece_bytes(tokens: int) -> int:
    """What is left to send when the last chunk's last layer is written: its keys and values."""
    last_chunk = tokens % K_CHUNK_TOKENS or K_CHUNK_TOKENS
    return last_chunk * K_MODELS[K_MODEL].kv_bytes_per_token // K_LAYERS


def verdicts(rows: Sequence[dict[str, Any]], rtt_s: float, rate_bps: float) -> list[Verdict]:
    """From raw rows alone."""
    found = []
    payload_bps = rate_bps * K_WIRE_SHARE
    for overlap in dict.fromkeys(row["overlap"] for row in rows):
        for tokens in sorted({row["tokens"] for row in rows}):
            mine = [row for row in rows if row["overlap"] == overlap and row["tokens"] == tokens]
            near, far = ([r["ttft_s"] for r in mine if r["where"] == w] for w in (K_NEAR, K_FAR))
            if not near or not far:
                continue
            near_s, far_s = statistics.median(near), statistics.median(far)
            left_s = last_piece_bytes(tokens) * 8 / payload_bps + K_SLACK_S
            tail_s = statistics.median(r["tail_s"] for r in mine if r["where"] == K_FAR)
            wire_s = tokens * K_MODELS[K_MODEL].kv_bytes_per_token * 8 / payload_bps
            found.append(
                Verdict(
                    overlap,
                    tokens,
                    near_s,
                    far_s,
                    far_s - near_s,
                    rtt_s + left_s,
                    tail_s,
                    rtt_s / 2 + left_s,
                    wire_s / near_s,
                    len(mine),
                )
            )
    return found


def checks(found: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Rows of name, outcome, value, wanted: `layer` within its bounds at every length, `end` at none, and the
    wire busy for long enough at each."""
    rows: list[dict[str, Any]] = []

    def judge(name: str, one: Verdict, passed: bool, value: float, wanted: float) -> None:
        outcome = "passed" if passed else "failed"
        row = {"name": f"{name}/{one.tokens}", "outcome": outcome}
        rows.append({**row, "value": round(value, 4), "wanted": round(wanted, 4)})

    for one in found:
        if one.overlap == "layer":
            judge("layer_within_bound", one, one.within, one.added_s, one.bound_s)
            judge("layer_tail_within_bound", one, one.tail_within, one.tail_s, one.tail_bound_s)
            judge("wire_share", one, one.wire_share >= K_LEAST_SHARE, one.wire_share, K_LEAST_SHARE)
        elif one.overlap == "end":
            judge("end_breaks_bound", one, not one.within, one.added_s, one.bound_s)
            judge("end_tail_breaks_bound", one, not one.tail_within, one.tail_s, one.tail_bound_s)
    return rows


def experiment_of(network: str) -> Experiment:
    """As the fleet takes it; the load is this module's own."""
    places = ((K_PREFILL, "east", "prefill"), (K_NEAR, "east", "decode"), (K_FAR, "west", "decode"))
    return Experiment.model_validate(
        {
            "name": "overlap",
            "description": "When KV is sent, and what distance adds to the first token.",
            "wall_time_s": 900,
            "network": network,
            "models": [{"name": K_MODEL}],
            "instances": [
                {"name": name, "site": site, "role": role, "kind": "sglang"} for name, site, role in places
            ],
            "workload": {
                "kind": "synthetic",
                "requests": 1,
                "arrivals": {"process": "at_once"},
                "input_tokens": 1,
                "output_tokens": 1,
            },
            "verify": True,  # the rows of both servers tell the tail
        }
    )  # fmt: skip


class OverlapFleet(Fleet):
    """Its prefill server sends as `overlap` says."""

    overlap = K_MODES[0]

    def _real(self, instance: Instance, name: str, site: Site, port: int) -> Server:
        server = super()._real(instance, name, site, port)
        if instance.role == "prefill":
            path = self.folder / f"{name}.yaml"
            write_json(path, {**yaml.safe_load(path.read_text()), "overlap": self.overlap})
        return server


class SiteAsker:
    """The client in a site."""

    def __init__(self, site: Site, log: Path) -> None:
        self._log = log.open("ab")
        self._process = site.popen(
            [sys.executable, "-m", "prfaas_testbed.client.asker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Raises PrfaasError for what isn't answered."""
        answer = self.answer(order)
        if answer["error"]:
            raise PrfaasError(f"a request of {order['tokens']} tokens: {answer['error']}")
        return answer

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        """Whatever it is."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the client ended; see its log"}
        return answer

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait(timeout=10)
        self._log.close()


def measure(
    topology: Topology,
    folder: Path,
    tell: Progress,
    rounds: int,
    modes: Sequence[str] = K_MODES,
    lengths: Sequence[int] = K_LENGTHS,
    wait_s: float = 0.0,
) -> Found:
    """The whole of it. Raises PrfaasError; what it started is gone by then."""
    from prfaas_testbed.network import open_network

    make_model()
    found = Found()
    work = folder / "work"
    with open_network(topology, folder, progress=tell, wait_s=wait_s) as net:
        tell("calibrating every link, each way")
        found.calibration = [row.as_row() for row in net.calibrate()]
        experiment = experiment_of(topology.name)
        fleet = OverlapFleet(net, experiment, experiment.models[0], work, tell)
        fleet.overlap = modes[0]
        askers: dict[str, SiteAsker] = {}
        try:
            with undisturbed(tell), OwnCore() as core:
                fleet.start()
                for mode in modes:
                    if mode != modes[0]:
                        tell(f"prefill starts again, with overlap: {mode}")
                        fleet.overlap = mode
                        fleet.restart_prefill(None)
                    pid = fleet.named(K_PREFILL).process.pid
                    assert pid is not None  # it is up
                    found.own_core = core.give(scheduler_of(pid)) is not None
                    if not found.own_core:
                        tell("one core: prefill shares it with the network's work, and is slower for it")
                    askers = open_askers(net, work)
                    _rounds(fleet, askers, mode, rounds, lengths, found, tell)
                    close_askers(askers)
                add_tails(found.rows, fleet.digests)
        finally:
            close_askers(askers)
            fleet.stop()
    return found


def make_model() -> None:
    """Set-up has made it, in a checkout that knew it then."""
    if not (K_MODELS_DIR / K_MODEL / "config.json").exists():
        script = Path(sys.modules[K_MODELS[K_MODEL].__module__].__file__ or "")
        done = subprocess.run(
            [str(sglang_python()), str(script), str(K_MODELS_DIR), K_MODEL], capture_output=True, check=False
        )
        if done.returncode:
            raise PrfaasError(f"the model {K_MODEL} can't be made: {done.stderr.decode()[-300:]}")


def open_askers(net: Network, work: Path) -> dict[str, SiteAsker]:
    return {
        where: SiteAsker(net.sites[site], work / f"asker-{where}.log")
        for where, site in ((K_NEAR, "east"), (K_FAR, "west"))
    }


def close_askers(askers: dict[str, SiteAsker]) -> None:
    while askers:
        askers.popitem()[1].close()


def _rounds(
    fleet: Fleet,
    askers: dict[str, SiteAsker],
    mode: str,
    rounds: int,
    lengths: Sequence[int],
    found: Found,
    tell: Progress,
) -> None:
    """In turns: each length in one site and in the other, one way round and then the other."""
    prefill = fleet.named(K_PREFILL)
    rng = Random(f"overlap/{mode}")
    for number in range(-K_WARM_ROUNDS, rounds):
        for tokens in lengths:
            order: dict[str, Any] = {"tokens": tokens, "output_tokens": K_OUTPUT_TOKENS}
            for where in (K_NEAR, K_FAR) if number % 2 else (K_FAR, K_NEAR):
                room = rng.getrandbits(62)
                fields = {
                    "bootstrap_host": prefill.host,
                    "bootstrap_port": prefill.bootstrap_port,
                    "bootstrap_room": room,
                }
                targets = [prefill.url, fleet.named(where).url]
                seed = rng.getrandbits(32)
                answer = askers[where].ask({**order, "seed": seed, "targets": targets, "fields": fields})
                if number >= 0:
                    row = {"overlap": mode, "round": number, "tokens": tokens, "where": where, "room": room}
                    times = {"ttft_s": answer["ttft_s"], "e2e_s": answer["e2e_s"]}
                    found.rows.append({**row, **times, "seed": seed})
        fleet.check_alive()
        tell(f"overlap {mode}: round {number + 1} of {rounds}" if number >= 0 else f"overlap {mode}: warm")


def add_tails(rows: list[dict[str, Any]], digests: Path) -> None:
    """From what the servers wrote of each room."""
    sent = {row["room"]: row for row in read_rows(digests, "sent")}
    landed = {row["room"]: row for row in read_rows(digests, "landed")}
    for row in rows:
        source = sent[row["room"]]
        row["tail_s"] = round(landed[row["room"]]["at_s"] - source["at_s"], 4)
        row["ahead_bytes"] = source["ahead_bytes"]


def as_rows(found: Sequence[Verdict]) -> list[dict[str, Any]]:
    return [
        {
            **{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(one).items()},
            "within": one.within,
        }
        for one in found
    ]
