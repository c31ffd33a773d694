"""Real servers and instances of the profile measured from them, between two emulated sites, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prfaas.config.experiment import (
    Experiment,
    ExperimentSet,
    Limits,
    ModelChoice,
    Part,
    load_experiment,
)
from prfaas.config.loading import check
from prfaas.config.profile import ProfileConfig
from prfaas.config.run import Run
from prfaas.model.errors import PrfaasError
from prfaas_testbed.experiment.machine import K_TOPOLOGIES
from prfaas_testbed.experiment.metrics import K_METRICS
from prfaas_testbed.experiment.pace import as_slow, slowness
from prfaas_testbed.experiment.sites import write_json
from prfaas_testbed.experiment.view import View

if TYPE_CHECKING:
    from prfaas_testbed.experiment.runner import Results
    from prfaas_testbed.experiment.sets import Conduct

K_EXPERIMENT = "likeness"
K_SIDES = ("real", "profiled")
K_COMPARED = ("ttft_p50_s", "ttft_p90_s", "transfer_p50_s", "transfer_p90_s")


def pair_set(model: str, profile: Path, turns: int) -> tuple[ExperimentSet, list[tuple[str, Experiment]]]:
    """The experiment `likeness` by both kinds of servers, so many times in turns; as a set and its parts."""
    base = load_experiment(K_EXPERIMENT, K_TOPOLOGIES)
    assert isinstance(base, Experiment)
    parts: list[tuple[str, Experiment]] = []
    for turn in range(turns):
        for side in K_SIDES if turn % 2 == 0 else K_SIDES[::-1]:
            parts.append((f"{side}-{turn + 1}", one_side(base, side, model, profile)))
    described = f"{base.description} By real servers and by instances profiled from them, in turns."
    choice = ExperimentSet(
        name=base.name, description=described[:400], wall_time_s=base.wall_time_s * len(parts),
        parts=[Part(name=name, experiment=base.name) for name, _ in parts],
    )  # fmt: skip
    return choice, parts


def one_side(base: Experiment, side: str, model: str, profile: Path) -> Experiment:
    """The experiment by servers of one kind."""
    kind = "sglang" if side == "real" else "profiled"
    # As the real ones are told to: one prompt a prefill step.
    limits = Limits(prefill_requests=1) if side == "profiled" else Limits()
    update: dict[str, Any] = {
        "models": [ModelChoice(name=model, profile=str(profile))],
        "instances": [
            instance.model_copy(update={"kind": kind, "limits": limits}) for instance in base.instances
        ],
    }
    return base.model_copy(update=update)


def at_its_pace(
    conduct: Conduct, folder: Path, profile: dict[str, Any], file: Path, paces: list[float]
) -> Conduct:
    """Parts as by `conduct`; after each of the real servers' `file` is the profile of a server as slow as
    theirs was there, for the parts to come, and `paces` has how slow."""
    alone = check(profile, ProfileConfig, str(file)).profile()

    def conducted(name: str, experiment: Experiment, results: Results) -> None:
        conduct(name, experiment, results)
        if not name.startswith("real-"):
            return
        (model,) = experiment.models
        log = (folder / name / "work" / model.name / "prefill.log").read_text(errors="replace")
        prompts = [row.prompt_tokens for row in next(iter(results.repetitions.values())).requests]
        paces.append(round(slowness(log, prompts, alone), 4))
        write_json(file, as_slow(profile, paces[-1]))

    return conducted


def compared(run: Run) -> dict[str, dict[str, Any]]:
    """Of each metric the value on either side, over all its parts, and profiled over real. Raises PrfaasError
    where a part didn't end."""
    stopped: Mapping[str, str] = (run.model_extra or {}).get("stopped_parts") or {}
    if stopped:
        name, why = next(iter(stopped.items()))
        raise PrfaasError(f"{name} didn't end, so that nothing can be compared: {why}")
    found: dict[str, dict[str, Any]] = {}
    for name in K_COMPARED:
        values = {
            side: [
                K_METRICS[name].compute(View(run, part)) for part in run.parts if part.startswith(f"{side}-")
            ]
            for side in K_SIDES
        }
        means = {side: sum(each) / len(each) for side, each in values.items()}
        found[name] = {**values, "ratio": round(means["profiled"] / means["real"], 4)}
    return found


def tell_compared(found: Mapping[str, Mapping[str, Any]], tell: Callable[[str], None]) -> None:
    for name, row in found.items():
        sides = ", ".join(f"{side} {' '.join(f'{v:.4f}' for v in row[side])}" for side in K_SIDES)
        tell(f"between two sites, {name}: {row['ratio']:.3f} ({sides})")
