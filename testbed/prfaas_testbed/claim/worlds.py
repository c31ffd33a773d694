"""One experiment in two worlds: what a testbed's record and a simulated run say of the same requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np

from prfaas.config.experiment import Experiment
from prfaas.config.policy import PolicyConfig
from prfaas.config.run import Run
from prfaas.config.workload import trace_lines
from prfaas.simulator.build import simulation_of
from prfaas.workload.generate import timed_requests
from prfaas.workload.requests import TimedRequest
from prfaas_testbed.claim.runs import (
    K_BASE_S,
    K_TOPOLOGIES,
    allowances_s,
    local_profile,
    uncached_tokens,
)
from prfaas_testbed.experiment.view import View, field, number

K_SKIP = 0.2  # of the arrivals, at the beginning: the system fills
K_LATE_S = 0.003  # in the record 87 in 100 of the testbed's requests are sent within it, half within 1.1 ms
K_COLUMNS = ("sent_s", "ttft_s", "e2e_s", "prompt_tokens", "cached_tokens", "wan_bytes", "failed")
K_COST_ROLES = ("router", "pump", "prefill", "decode", "collocated")


@dataclass(frozen=True)
class Played:
    """The requests of one repetition in one world, in order of arrival; NaN where nothing is known."""

    columns: dict[str, np.ndarray]
    sites: tuple[str, ...]
    """Where each was prefilled; empty where it wasn't."""

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    @property
    def answered(self) -> np.ndarray:
        found: np.ndarray = ~np.isnan(self["ttft_s"]) & (self["failed"] == 0)
        return found

    def figures(self, allowed_s: np.ndarray | None = None) -> dict[str, float | int | None]:
        """The same figures for either world. `allowed_s`: from arrival to deadline of the first token."""
        good = self.answered
        sent, ended = self["sent_s"], self["sent_s"] + self["e2e_s"]
        begin_s, end_s = float(np.quantile(sent, K_SKIP)), float(sent.max())
        ttft = self["ttft_s"][good]
        span_s = float(ended[good].max() - sent.min()) if good.any() else np.nan
        found: dict[str, float | int | None] = {
            "requests": len(self),
            "failed": int((~good).sum()),
            "offered_rps": len(self) / float(sent.max() - sent.min()),
            "answered_rps": float((good & (ended >= begin_s) & (ended < end_s)).sum()) / (end_s - begin_s),
            "first_tokens_rps": float(
                (good & (sent + self["ttft_s"] >= begin_s) & (sent + self["ttft_s"] < end_s)).sum()
            )
            / (end_s - begin_s),
            "ttft_mean_s": float(ttft.mean()) if ttft.size else None,
            "offloaded_share": float((self["wan_bytes"][good] > 0).mean()) if good.any() else None,
            "egress_gbps": float(self["wan_bytes"][good].sum()) * 8 / span_s / 1e9,
        }
        for q in (0.5, 0.9, 0.99):
            found[f"ttft_p{q * 100:.0f}_s"] = float(np.quantile(ttft, q)) if ttft.size else None
        if allowed_s is not None:
            in_time = good & (self["ttft_s"] <= allowed_s)
            found["within_slo"] = float(in_time.mean())
        return found

    def plain(self) -> dict[str, list[Any]]:
        """For a record: a list a column."""
        found: dict[str, list[Any]] = {
            name: [None if np.isnan(one) else round(float(one), 4) for one in self.columns[name]]
            for name in K_COLUMNS
        }
        return {**found, "site": list(self.sites)}

    @classmethod
    def of_plain(cls, found: Mapping[str, Sequence[Any]]) -> Played:
        """What `plain` wrote."""
        return cls(
            {
                name: np.array([np.nan if v is None else v for v in found[name]], dtype=float)
                for name in K_COLUMNS
            },
            tuple(found["site"]),
        )


def requests_of_testbed(experiment: Experiment) -> list[TimedRequest]:
    """The requests as the testbed draws them: the same in every repetition."""
    lines = trace_lines(experiment.workload, K_TOPOLOGIES)
    found = timed_requests(experiment.workload, Random(experiment.seed), lines)
    if experiment.prompts == "independent":
        return [replace(one, block_ids=()) for one in found]
    return list(found)


def alike(requests: Sequence[TimedRequest], prompt_tokens: Sequence[float]) -> bool:
    """Whether these are the requests that a record has."""
    return sorted(one.prompt_tokens for one in requests) == sorted(prompt_tokens)


def simulated(
    experiment: Experiment, requests: Sequence[TimedRequest], policy: PolicyConfig | None = None
) -> Played:
    """These requests through the simulator, by the experiment's policy or another."""
    record = simulation_of(experiment, K_TOPOLOGIES, requests=requests, policy=policy, sample=False).run()
    order = np.argsort(np.asarray(record.index))
    if len(order) != len(requests):
        raise AssertionError(f"{len(requests)} requests, {len(order)} in the record")
    raw = {
        "sent_s": record.arrival_s, "ttft_s": record.ttft_s, "e2e_s": record.e2e_s,
        "prompt_tokens": record.prompt_tokens, "cached_tokens": record.cached_tokens,
        "wan_bytes": record.kv_bytes,
    }  # fmt: skip
    columns = {name: np.asarray(values, dtype=float)[order] for name, values in raw.items()}
    columns["failed"] = (np.asarray(record.error) != 0)[order].astype(float)
    return Played(columns, tuple(record.names[record.site[i]] for i in order))


def sent_late(requests: Sequence[TimedRequest], index: int) -> list[TimedRequest]:
    """The requests as a client sends them, another way for each index: by up to K_LATE_S late, 0 on time."""
    if not index:
        return list(requests)
    drawn = Random(index)
    late = [replace(one, arrival_s=one.arrival_s + drawn.uniform(0, K_LATE_S)) for one in requests]
    return sorted(late, key=lambda one: one.arrival_s)


def on_testbed(run: Run, part: str | None) -> Iterator[tuple[int, Played]]:
    """Each repetition of a part. Bytes are scaled back to those of the profiles."""
    own = (run.model_extra or {}).get("part_runs", {}).get(part, {})
    scale = float(own.get("scale", run.scale))
    for index, rows in View(run, part).repetitions():
        ordered = sorted(rows, key=lambda row: row.sent_s - (number(row, "lateness_s") or 0.0))
        columns: dict[str, list[float]] = {name: [] for name in K_COLUMNS}
        for row in ordered:
            values = (
                row.sent_s, row.ttft_s, row.e2e_s, row.prompt_tokens, row.cached_tokens or 0,
                (row.kv_bytes or 0) * scale if field(row, "transfer") == "wan" else 0,
                row.error is not None,
            )  # fmt: skip
            for name, value in zip(K_COLUMNS, values, strict=True):
                columns[name].append(np.nan if value is None else float(value))
        arrays = {name: np.array(values) for name, values in columns.items()}
        yield index, Played(arrays, tuple(row.site or "" for row in ordered))


def allowed_s(experiment: Experiment, requests: Sequence[TimedRequest], time_scale: float) -> np.ndarray:
    """The claim's deadline of each request's first token, where every second stands for `time_scale`."""
    profile = local_profile(experiment)
    fresh = uncached_tokens(requests, profile)
    return allowances_s(requests, fresh, profile, base_s=K_BASE_S / time_scale)


def costs(run: Run, part: str | None, index: int) -> dict[str, float]:
    """CPU of a repetition, in cores, by role: `router`, `pump`, …, each of all its processes together."""
    found = dict.fromkeys(K_COST_ROLES, 0.0)
    repetition = next(one for one in run.repetitions if one.index == index)
    for row in repetition.events:
        role = str(field(row, "role"))
        if row.event == "cost" and field(row, "part") == part and role in found:
            found[role] += (number(row, "cpu_s") or 0.0) / max(1e-3, number(row, "wall_s") or 0.0)
    shares = [
        number(row, "client_cpu_share") or 0.0
        for row in repetition.events
        if row.event == "load" and field(row, "part") == part
    ]
    return {**found, "client": sum(shares)}
