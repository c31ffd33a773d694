"""Rounds: one load after the other on the same servers, each with its own trouble and a reckoning after it.

    load with trouble -> until nothing is held -> until a probe is answered rightly -> next

Real servers take most of a minute to start, so that twenty kinds of trouble share them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

from prfaas.config.experiment import Experiment, Round
from prfaas.config.run import EventRow
from prfaas_testbed.experiment.fleet import Fleet
from prfaas_testbed.experiment.load import K_PROFILED_VOCABULARY, Planned, one_server_shots
from prfaas_testbed.experiment.view import field
from prfaas_testbed.instances.models import K_FIRST_PLAIN_TOKEN, K_PLAIN_TOKENS

if TYPE_CHECKING:
    from prfaas_testbed.experiment.runner import Runner
    from prfaas_testbed.network import Network

K_FREE_S = 45.0  # more than the 30 s that pages and leases may take, to see by how much
K_WHOLE_S = 60.0
K_PROBE_TOKENS, K_PROBE_OUTPUT_TOKENS = 64, 4
K_PROBE_EVERY_S = 0.5


def probe_of(requests: Sequence[Planned], real: bool) -> Planned:
    """A short request that asks whether the service is whole; in the plain pass it comes last."""
    rng = Random("probe")
    low, count = (K_FIRST_PLAIN_TOKEN, K_PLAIN_TOKENS) if real else (0, K_PROFILED_VOCABULARY)
    tokens = [low + rng.randrange(count) for _ in range(K_PROBE_TOKENS)]
    return Planned("probe", max(one.at_s for one in requests), tokens, K_PROBE_OUTPUT_TOKENS)


def stretched(requests: Sequence[Planned], experiment: Experiment, chosen: Round) -> list[Planned]:
    """The same requests over the round's time."""
    if chosen.duration_s is None:
        return list(requests)
    length_s = experiment.workload.duration_s or max(one.at_s for one in requests) or 1.0
    return [replace(one, at_s=one.at_s * chosen.duration_s / length_s) for one in requests]


def play_rounds(
    runner: Runner, net: Network, fleet: Fleet, requests: Sequence[Planned], probe: Planned
) -> None:
    """All rounds, as often as the experiment has repetitions; round i of repetition r is repetition
    r * rounds + i of the record. An emulator that lagged doesn't void a round: what was answered, and how, is
    true all the same; the round's row says that it lagged.
    """
    rounds = runner.experiment.rounds
    wanted = None
    for plain in runner.results.baseline:
        ids = field(plain, "output_ids")
        if plain.id == probe.id and plain.model == fleet.model.name and plain.error is None:
            wanted = [int(one) for one in ids] if isinstance(ids, list) else None
    free(net, fleet)  # of the first requests, and what they left in caches
    for place in range(runner.experiment.repetitions * len(rounds)):
        chosen = rounds[place % len(rounds)]
        runner.tell(f"{fleet.model.name}: round {place + 1}, {chosen.name}")
        found = runner.attempt(
            net, fleet, stretched(requests, runner.experiment, chosen), f"round{place}", chosen.timeline,
            lambda zero_s: settle(runner, net, fleet, zero_s, probe, wanted),
        )  # fmt: skip
        row = {"at_s": 0.0, "event": "round", "round": chosen.name, "lagged": found.void}
        found.events.append(EventRow.model_validate(row))
        runner.keep(fleet, found, place)
        errors = [one.error for one in found.rows if one.error]
        runner.tell(
            f"  {sum(one.tokens_equal is True for one in found.rows)} equal, {len(errors)} refused, "
            f"{sum(one.tokens_equal is False for one in found.rows)} wrong"
            + (f"; the first: {errors[0][:150]}" if errors else "")
        )


def settle(
    runner: Runner, net: Network, fleet: Fleet, zero_s: float, probe: Planned, wanted: list[int] | None
) -> list[EventRow]:
    """After a load: events `settled` (what each site still held, and how long) and `probe` (until one is
    answered rightly).
    """
    at_s = time.monotonic()
    rows = [
        {"at_s": round(at_s - zero_s, 3), "event": "settled", "site": site, **found}
        for site, found in free(net, fleet).items()
    ]
    url = fleet.router.url if fleet.router is not None else fleet.by_role("decode", "collocated")[0].url
    end_s, good = time.monotonic() + K_WHOLE_S, False
    while not good and time.monotonic() < end_s:
        shots = one_server_shots([replace(probe, at_s=0.0)], url, runner.real, K_WHOLE_S)
        (answer,), sent_s, _ = runner.send(net, fleet, shots, "probe", quiet=True)
        good = answer.error is None and (wanted is None or answer.output_ids == wanted)
        rows.append(
            {"at_s": round(sent_s - zero_s, 3), "event": "probe", "good": good, "error": answer.error,
             "e2e_s": answer.e2e_s}
        )  # fmt: skip
        if not good:
            time.sleep(K_PROBE_EVERY_S)
    return [EventRow.model_validate(row) for row in rows]


def empty(net: Network, fleet: Fleet, tell: Callable[[str], None]) -> None:
    """Until servers and pumps hold nothing, prefix caches neither: a repetition has the same prompts as the
    one before, and would find them there."""
    for site, found in free(net, fleet).items():
        if found["free_s"] is None:
            tell(f"{site} still holds something: {found.get('held') or found.get('error')}")


def free(net: Network, fleet: Fleet) -> dict[str, dict[str, Any]]:
    """Of each site with servers, what `held` says of it, asked of all at once."""
    words = {
        name: [
            sys.executable, "-m", "prfaas_testbed.experiment.held", f"{K_FREE_S:g}",
            str(fleet.pump_config(name)), *(s.url for s in fleet.servers if s.site == name),
        ]
        for name in net.sites
        if any(server.site == name for server in fleet.servers)
    }  # fmt: skip
    running = {
        name: net.sites[name].popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name, argv in words.items()
    }
    found: dict[str, dict[str, Any]] = {}
    for name, process in running.items():
        out, err = process.communicate()
        said = (err.strip().splitlines() or ["nothing"])[-1]
        found[name] = json.loads(out) if process.returncode == 0 else {"free_s": None, "error": said}
    return found
