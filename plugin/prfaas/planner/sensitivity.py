"""How the best throughput answers to each input: one at a time, a tenth or one instance up and down."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from prfaas.model.lengths import Scaled, TruncatedLognormal
from prfaas.planner.optimum import optimum
from prfaas.planner.system import Plan, System, evaluate

K_STEP = 0.1


@dataclass(frozen=True)
class Row:
    """One input changed."""

    input: str
    change: str
    throughput_rps: float
    """Λ_max, threshold and split chosen anew."""
    held_rps: float | None
    """Λ_max with threshold and split as they were; None where that split no longer exists."""
    elasticity: float | None
    """Relative change of Λ_max over relative change of the input; None for steps of a whole instance."""


def inputs(system: System) -> dict[str, Callable[[System, float], System]]:
    """Every continuous input: its name, and the system with it `factor` times as large."""
    found: dict[str, Callable[[System, float], System]] = {
        "egress_bps": lambda s, f: s.changed(egress_bps=s.egress_bps * f),
        "prfaas prefill_s": lambda s, f: s.changed(prfaas_prefill=s.prfaas_prefill.scaled(f)),
        "kv_bytes": lambda s, f: s.changed(kv=s.kv.scaled(f)),
        "local prefill_s": lambda s, f: s.changed(local_prefill=s.local_prefill.scaled(f)),
        "decode step_s": lambda s, f: s.changed(decode=replace(s.decode, step=s.decode.step.scaled(f))),
        "decode max_batch": lambda s, f: s.changed(
            decode=replace(s.decode, max_batch=max(1, round(s.decode.max_batch * f)))
        ),
        "output_tokens": lambda s, f: s.changed(output_tokens=s.output_tokens * f),
        "input_tokens (all lengths)": lambda s, f: s.changed(lengths=Scaled(s.lengths, f)),
    }
    if isinstance(system.lengths, TruncatedLognormal):
        found |= {
            "input_tokens.mu (median)": lambda s, f: _lognormal(s, mu=math.log(f)),
            "input_tokens.sigma": lambda s, f: _lognormal(s, sigma_factor=f),
            "input_tokens.min": lambda s, f: _lognormal(s, low_factor=f),
            "input_tokens.max": lambda s, f: _lognormal(s, high_factor=f),
        }
    return found


def _lognormal(
    system: System, mu: float = 0, sigma_factor: float = 1, low_factor: float = 1, high_factor: float = 1
) -> System:
    old = system.lengths
    assert isinstance(old, TruncatedLognormal)
    new = TruncatedLognormal(
        old.mu + mu, old.sigma * sigma_factor, old.low * low_factor, old.high * high_factor
    )
    return system.changed(lengths=new)


def sensitivity(system: System, plan: Plan) -> list[Row]:
    """A row for each input and direction. `plan` is the one that is held."""
    rows = []
    base = optimum(system).throughput_rps
    for name, change in inputs(system).items():
        for factor in (1 - K_STEP, 1 + K_STEP):
            changed = change(system, factor)
            best = optimum(changed).throughput_rps
            elasticity = (best / base - 1) / (factor - 1)
            rows.append(Row(name, f"{factor - 1:+.0%}", best, _held(changed, plan), elasticity))
    for name, count in (
        ("prfaas instances", system.prfaas_instances),
        ("local instances", system.local_instances),
    ):
        field = name.replace(" ", "_")
        for step in (-1, 1):
            if count + step < (0 if field == "prfaas_instances" else 2):
                continue
            changed = system.changed(**{field: count + step})
            rows.append(Row(name, f"{step:+d}", optimum(changed).throughput_rps, _held(changed, plan), None))
    return rows


def _held(system: System, plan: Plan) -> float | None:
    if plan.prefill >= system.local_instances:
        return None
    return evaluate(system, plan.threshold_tokens, plan.prefill).throughput_rps
