"""One simulated run for the claim: requests, their deadlines by one rule for all systems, and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

import prfaas.routing  # noqa: F401  (registers the policies)
from prfaas.config.experiment import Experiment, ExperimentSet, load_experiment, parts_of
from prfaas.config.places import checkout
from prfaas.config.policy import PolicyConfig
from prfaas.config.profile import find_profile
from prfaas.config.workload import trace_lines
from prfaas.model.profiles import Profile
from prfaas.simulator.build import Simulation, profile_of, simulation_of
from prfaas.simulator.cache import BlockCache
from prfaas.simulator.record import Record
from prfaas.simulator.scale import completion_rate_rps
from prfaas.workload.generate import timed_requests
from prfaas.workload.requests import TimedRequest

K_TOPOLOGIES = checkout() / "topologies"
K_BASE_S = 2.0  # the SLO: a first token within 2 s and
K_PREFILL_FACTOR = 2.0  # twice the time that the prompt's prefill takes alone in the local cluster
K_SLO_SHARE = 0.9  # of the requests must keep it for a rate to count as kept


@dataclass(frozen=True)
class Outcome:
    """One run, and what is judged."""

    requests: Sequence[TimedRequest]
    uncached: np.ndarray
    """Tokens of each prompt that no earlier prompt had, by request."""
    allowed_s: np.ndarray
    """Seconds from arrival to deadline, by request."""
    record: Record
    simulation: Simulation

    @property
    def in_time(self) -> np.ndarray:
        """By place in the record: answered without error, and its first token in time."""
        index, ttft = np.asarray(self.record.index), np.asarray(self.record.ttft_s)
        found: np.ndarray = (np.asarray(self.record.error) == 0) & (ttft <= self.allowed_s[index])
        return found

    @property
    def tpot_s(self) -> np.ndarray:
        """By place in the record: seconds a token after the first."""
        tokens = np.maximum(1, np.asarray(self.record.output_tokens) - 1)
        found: np.ndarray = (np.asarray(self.record.e2e_s) - np.asarray(self.record.ttft_s)) / tokens
        return found

    @property
    def within_slo(self) -> float:
        return float(self.in_time.sum() / len(self.requests))

    def figures(self) -> dict[str, Any]:
        """What a row of a piece says of a run."""
        record, summary = self.record, self.record.summary()
        rate_rps = completion_rate_rps(record)
        return {
            "requests": len(self.requests),
            "offered_rps": len(self.requests) / max(1e-9, self.requests[-1].arrival_s),
            "lost": len(self.requests) - len(record),
            "failed": summary["failed"],
            "completion_rps": rate_rps,
            "within_slo": self.within_slo,
            "ttft_mean_s": summary["ttft_mean_s"],
            "ttft_p50_s": summary["ttft_p50_s"],
            "ttft_p90_s": summary["ttft_p90_s"],
            "tpot_p90_s": float(np.nanquantile(self.tpot_s, 0.9)),
            "offloaded_share": summary["offloaded_share"],
            "moved_share": summary["moved_share"],
            "egress_gbps": rate_rps * float(np.mean(record.kv_bytes) + np.mean(record.moved_bytes)) * 8 / 1e9,
        }


def parts(name: str) -> list[tuple[str, Experiment]]:
    """The parts of a set under topologies/experiments."""
    found = load_experiment(name, K_TOPOLOGIES)
    return list(parts_of(found, K_TOPOLOGIES)) if isinstance(found, ExperimentSet) else [("", found)]


def requests_of(experiment: Experiment, repetition: int) -> list[TimedRequest]:
    """The repetition's requests: the same for every system, as the simulator itself draws them."""
    seed = Random(experiment.seed * 1_000_003 + repetition)
    return list(timed_requests(experiment.workload, seed, trace_lines(experiment.workload, K_TOPOLOGIES)))


def at_rate(experiment: Experiment, rate_rps: float) -> Experiment:
    """The same workload at another mean rate."""
    workload = experiment.workload
    arrivals = getattr(workload, "arrivals", None)
    if arrivals is None:
        changed = workload.model_copy(update={"rate_rps": rate_rps, "rate_scale": None})
    elif arrivals.process == "on_off":
        mean = (arrivals.on_rps * arrivals.on_s + arrivals.off_rps * arrivals.off_s) / (
            arrivals.on_s + arrivals.off_s
        )
        update = {"on_rps": arrivals.on_rps * rate_rps / mean, "off_rps": arrivals.off_rps * rate_rps / mean}
        changed = workload.model_copy(update={"arrivals": arrivals.model_copy(update=update)})
    else:
        changed = workload.model_copy(update={"arrivals": arrivals.model_copy(update={"rate_rps": rate_rps})})
    return experiment.model_copy(update={"workload": changed})


def local_profile(experiment: Experiment) -> Profile:
    """The local cluster's own: prefill times there make the SLO."""
    local = next(one for one in experiment.instances if one.role != "prefill")
    return profile_of(local, experiment.models[0], K_TOPOLOGIES)


def far_profile(name: str) -> Profile:
    return find_profile(name, K_TOPOLOGIES)


def uncached_tokens(requests: Sequence[TimedRequest], profile: Profile) -> np.ndarray:
    """What each prompt adds to all before it, if nothing were ever evicted and all had one cache.

    No system can reuse more, so that this is fair as the SLO's measure and safe in a bound.
    """
    cache = BlockCache(requests[0].block_tokens, None, exact=profile.state_bytes > 0)
    found = np.empty(len(requests))
    for place, request in enumerate(requests):
        cached = cache.match(request.block_ids, request.prompt_tokens) if request.block_ids else 0
        found[place] = request.prompt_tokens - cached
        if request.block_ids:
            cache.insert(request.block_ids, request.prompt_tokens)
    return found


def allowances_s(
    requests: Sequence[TimedRequest], uncached: np.ndarray, profile: Profile, base_s: float = K_BASE_S
) -> np.ndarray:
    """Seconds from arrival within which each first token is due."""
    alone_s = [
        profile.prefill_s(one.prompt_tokens, one.prompt_tokens - int(fresh))
        for one, fresh in zip(requests, uncached, strict=True)
    ]
    return base_s + K_PREFILL_FACTOR * np.array(alone_s)


def play(
    experiment: Experiment,
    repetition: int,
    *,
    requests: Sequence[TimedRequest] | None = None,
    policy: PolicyConfig | None = None,
    prepare: Callable[[Simulation], None] | None = None,
) -> Outcome:
    """One run to its end; `prepare` sees it before it begins."""
    if requests is None:
        requests = requests_of(experiment, repetition)
    profile = local_profile(experiment)
    uncached = uncached_tokens(requests, profile)
    simulation = simulation_of(
        experiment, K_TOPOLOGIES, repetition=repetition, policy=policy, requests=requests, sample=False
    )
    if prepare is not None:
        prepare(simulation)
    # In slices: a link that stays down is probed for ever, so that the agenda alone never comes to an end.
    record = simulation.run(lambda now, done: None)
    return Outcome(requests, uncached, allowances_s(requests, uncached, profile), record, simulation)
