"""How soon a request that the link has no place for is refused, over a wide-area network.

Real SGLang on CPU: a prefill server in `east`, which asks the link's ledger for places within a millisecond,
so that there never is one; a decode server in `west`, and a client beside it that asks both, one request at a
time. The refusal is reached in `east` when decode's word of its pages is there, and must be at the client one
round trip and 100 ms after it asked: with its code and Retry-After, on both sides, before any stream. No
prompt is computed, and nothing is held for it afterwards.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml

from prfaas.config.experiment import Experiment, Instance
from prfaas.config.topology import Topology
from prfaas.sglang.refusal import K_CODE, K_STATUS
from prfaas_testbed.experiment.fleet import Fleet
from prfaas_testbed.experiment.overlap import SiteAsker
from prfaas_testbed.experiment.profiling import undisturbed
from prfaas_testbed.experiment.servers import Server
from prfaas_testbed.experiment.sites import write_json
from prfaas_testbed.network import Site, open_network

K_MODEL = "dense"
K_LENGTHS = (256, 2048, 8000)
K_SLACK_S = 0.100
K_WITHIN_S = 0.001
K_FREE_S = 10.0
K_WARM_ROUNDS = 1
K_PREFILL, K_DECODE = "prefill", "decode"

Progress = Callable[[str], None]


@dataclass
class Found:
    """Raw values."""

    calibration: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """A row a request and side: `round`, `tokens`, `side`, `status`, `code`, `retry_after`, `seconds`."""
    computed_tokens: int | None = None
    """Of prompts, by the prefill server's own word."""
    held: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By site: what was held last, and after how long nothing was."""


def experiment_of(network: str) -> Experiment:
    """As the fleet takes it; the load is this module's own."""
    places = ((K_PREFILL, "east"), (K_DECODE, "west"))
    return Experiment.model_validate(
        {
            "name": "refusal",
            "description": "How soon a request that the link has no place for is refused.",
            "wall_time_s": 600,
            "network": network,
            "models": [{"name": K_MODEL}],
            "transfer": {"estimated": True},  # a ledger for the link
            "instances": [
                {"name": role, "site": site, "role": role, "kind": "sglang"} for role, site in places
            ],
            "workload": {
                "kind": "synthetic",
                "requests": 1,
                "arrivals": {"process": "at_once"},
                "input_tokens": 1,
                "output_tokens": 1,
            },
        }
    )


class RefusingFleet(Fleet):
    """Its prefill server asks for places that no link has."""

    def _real(self, instance: Instance, name: str, site: Site, port: int) -> Server:
        server = super()._real(instance, name, site, port)
        if instance.role == K_PREFILL:
            path = self.folder / f"{name}.yaml"
            fields = {"admission": {"within_s": K_WITHIN_S, "may_queue": False}}
            write_json(path, {**yaml.safe_load(path.read_text()), **fields})
        return server


def measure(topology: Topology, folder: Path, tell: Progress, rounds: int, wait_s: float = 0.0) -> Found:
    """The whole of it. Raises PrfaasError; what it started is gone by then."""
    found, work = Found(), folder / "work"
    with open_network(topology, folder, progress=tell, wait_s=wait_s) as net:
        tell("calibrating every link, each way")
        found.calibration = [row.as_row() for row in net.calibrate()]
        experiment = experiment_of(topology.name)
        fleet = RefusingFleet(net, experiment, experiment.models[0], work, tell)
        try:
            with undisturbed(tell):
                fleet.start()
                asker = SiteAsker(net.sites["west"], work / "asker.log")
                try:
                    _rounds(fleet, asker, rounds, found)
                finally:
                    asker.close()
                found.computed_tokens = _computed_tokens(fleet)
                found.held = {site: _held(fleet, site) for site in ("east", "west")}
        finally:
            fleet.stop()
    return found


def _rounds(fleet: Fleet, asker: SiteAsker, rounds: int, found: Found) -> None:
    prefill, decode = fleet.named(K_PREFILL), fleet.named(K_DECODE)
    rng = Random("refusal")
    for number in range(-K_WARM_ROUNDS, rounds):
        for tokens in K_LENGTHS:
            fields = {
                "bootstrap_host": prefill.host,
                "bootstrap_port": prefill.bootstrap_port,
                "bootstrap_room": rng.getrandbits(62),
            }
            answer = asker.answer(
                {
                    "tokens": tokens, "output_tokens": 2, "seed": rng.getrandbits(32), "fields": fields,
                    "targets": [prefill.url, decode.url],
                }
            )  # fmt: skip
            # What is answered with tokens has no sides: both have done their part.
            sides = answer.get("sides", [answer, answer])
            for side, one in zip((K_PREFILL, K_DECODE), sides, strict=True):
                if number >= 0:
                    found.rows.append({"round": number, "tokens": tokens, "side": side, **row_of(one)})
        fleet.check_alive()


def row_of(answer: dict[str, Any]) -> dict[str, Any]:
    """What one side's answer was. One that isn't a refusal says so by its status and code."""
    try:
        code = json.loads(answer["body"])["error"]["code"]
    except (KeyError, TypeError, ValueError):
        code = None
    return {
        "status": answer.get("status", 200),
        "code": code,
        "retry_after": answer.get("retry_after"),
        "seconds": round(answer.get("e2e_s", 0.0), 4),
    }


K_COMPUTED = """
import sys
from prfaas_testbed.instances.sglang_client import loads
print(loads(sys.argv[1])["total_prefill_uncached_tokens"])
"""


def _computed_tokens(fleet: Fleet) -> int:
    server = fleet.named(K_PREFILL)
    return int(fleet.net.sites[server.site].check([sys.executable, "-c", K_COMPUTED, server.url]).split()[-1])


def _held(fleet: Fleet, site: str) -> dict[str, Any]:
    urls = [server.url for server in fleet.servers if server.site == site]
    program = [sys.executable, "-m", "prfaas_testbed.experiment.held", f"{K_FREE_S:g}"]
    said = fleet.net.sites[site].check([*program, str(fleet.pump_config(site)), *urls])
    row: dict[str, Any] = json.loads(said.splitlines()[-1])
    return row


def checks(found: Found, rtt_s: float) -> list[dict[str, Any]]:
    """Rows of name, outcome, value, wanted."""
    rows: list[dict[str, Any]] = []

    def judge(name: str, passed: bool, value: float, wanted: float) -> None:
        outcome = "passed" if passed else "failed"
        rows.append({"name": name, "outcome": outcome, "value": round(value, 4), "wanted": round(wanted, 4)})

    bound_s = rtt_s + K_SLACK_S
    for side in (K_PREFILL, K_DECODE):
        for tokens in K_LENGTHS:
            seconds = [r["seconds"] for r in found.rows if (r["side"], r["tokens"]) == (side, tokens)]
            middle_s = statistics.median(seconds)
            judge(f"refused_within/{side}/{tokens}", middle_s <= bound_s, middle_s, bound_s)
    right = [_is_refusal(row) for row in found.rows]
    judge("refused_share", all(right), sum(right) / len(right), 1)
    if found.computed_tokens is not None:
        judge("prompt_tokens_computed", found.computed_tokens == 0, found.computed_tokens, 0)
    for site, row in found.held.items():
        judge(f"free/{site}", row["free_s"] is not None, row["free_s"] or K_FREE_S, K_FREE_S)
    return rows


def _is_refusal(row: dict[str, Any]) -> bool:
    retry: Sequence[str] = str(row["retry_after"] or "")
    return (row["status"], row["code"]) == (K_STATUS, K_CODE) and str(retry).isdigit()
