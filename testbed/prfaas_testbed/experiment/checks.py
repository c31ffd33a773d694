"""Judging a run: an experiment's checks, computed from the run's raw rows, at its end and ever after."""

from __future__ import annotations

import math
from collections.abc import Iterable

from prfaas.config.experiment import CheckSpec
from prfaas.config.run import CheckRow, Run
from prfaas.model.errors import EXIT_FELL_SHORT, EXIT_MACHINE, EXIT_OK, ConfigError
from prfaas_testbed.experiment.metrics import K_METRICS, Unsupported
from prfaas_testbed.experiment.view import View


def require_known(specs: Iterable[CheckSpec], file: str) -> None:
    """Raises ConfigError for a metric that nobody computes: before the run, not after it."""
    for spec in specs:
        if (spec.metric or spec.name) not in K_METRICS:
            raise ConfigError(
                file,
                f"checks.{spec.name}.metric",
                spec.metric or spec.name,
                f"known: {', '.join(sorted(K_METRICS))}",
            )


def wanted(spec: CheckSpec) -> str:
    bounds = [f">= {spec.at_least:g}"] if spec.at_least is not None else []
    bounds += [f"<= {spec.at_most:g}"] if spec.at_most is not None else []
    return " and ".join(bounds)


def judge_one(view: View, spec: CheckSpec, name: str) -> CheckRow:
    """Unsupported is never a pass: the caller's exit status counts it apart."""
    found = K_METRICS[spec.metric or spec.name]
    try:
        value = found.compute(View(view.run, view.part, spec.model or view.model))
    except Unsupported as reason:
        return CheckRow(name=name, outcome="unsupported", value=None, wanted=wanted(spec), reason=str(reason))
    good = not math.isnan(value)
    good = good and (spec.at_least is None or value >= spec.at_least)
    good = good and (spec.at_most is None or value <= spec.at_most)
    return CheckRow(
        name=name, outcome="passed" if good else "failed", value=round(value, 6), wanted=wanted(spec)
    )


def judge(run: Run) -> list[CheckRow]:
    """Every check of the definition that the run carries, in its order; in a set, as PART/CHECK."""
    rows: list[CheckRow] = []
    parts = run.definition.get("parts")
    if isinstance(parts, dict):
        extra = run.model_extra or {}
        stopped = extra.get("stopped_parts") or {}
        for part, definition in parts.items():
            if part in stopped:
                rows.append(
                    CheckRow(
                        name=f"{part}/ran",
                        outcome="failed",
                        value=None,
                        wanted="to its end",
                        reason=stopped[part],
                    )
                )
            specs = [CheckSpec.model_validate(spec) for spec in definition.get("checks", [])]
            require_known(specs, f"part {part}")
            rows += [judge_one(View(run, part), spec, f"{part}/{spec.name}") for spec in specs]
        missing = [part for part in extra.get("parts_planned") or [] if part not in parts]
        rows += [
            CheckRow(
                name=f"{part}/ran", outcome="failed", value=None, wanted="to its end", reason="not run yet"
            )
            for part in missing
        ]
        return rows
    specs = [CheckSpec.model_validate(spec) for spec in run.definition.get("checks", [])]
    require_known(specs, run.experiment)
    return [judge_one(View(run), spec, spec.name) for spec in specs]


def exit_status(rows: Iterable[CheckRow], run: Run | None = None) -> int:
    """0 where all passed or were unsupported with a reason, 1 where one failed; 3 where nothing failed but
    parts of a set that this machine stopped."""
    failed = [row.name for row in rows if row.outcome == "failed"]
    if not failed:
        return EXIT_OK
    extra = (run.model_extra or {}) if run is not None else {}
    stopped = {
        part
        for part, own in (extra.get("part_runs") or {}).items()
        if own.get("stopped") and own.get("status") == EXIT_MACHINE
    }
    missing = {
        part for part in extra.get("parts_planned") or () if part not in (extra.get("part_runs") or {})
    }
    parts = {name.partition("/")[0] for name in failed}
    return EXIT_MACHINE if parts & stopped and parts <= stopped | missing else EXIT_FELL_SHORT
