"""`prfaas-testbed profile MODEL`: a profile file measured from a real SGLang server on this machine."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from datetime import UTC, datetime

import yaml

from prfaas.cli._places import place
from prfaas.config.loading import check
from prfaas.config.profile import ProfileConfig
from prfaas.config.run import CheckRow, Run, stamp, write_run
from prfaas.model.errors import EXIT_FELL_SHORT, EXIT_OK, UsageError
from prfaas_testbed.experiment.likeness import K_ROUNDS
from prfaas_testbed.experiment.machine import (
    K_CHECKOUT,
    K_RESULTS,
    K_TOPOLOGIES,
    commit,
    machine,
    versions,
)
from prfaas_testbed.experiment.profiling import measure
from prfaas_testbed.experiment.role_switch import measure_role_switch
from prfaas_testbed.experiment.sites import write_json
from prfaas_testbed.instances.models import K_MODELS


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("profile", help="measure a real server into a profile file")
    parser.add_argument("model", help=f"one of {', '.join(K_MODELS)}")
    parser.add_argument(
        "--out", type=place, metavar="FILE", help="default: topologies/profiles/cpu-MODEL.yaml"
    )
    parser.add_argument(
        "--rounds", type=int, default=K_ROUNDS, metavar="N",
        help=f"rounds of requests to it and to a profiled instance (default {K_ROUNDS}; 0: none)",
    )  # fmt: skip
    parser.add_argument(
        "--role-switch", action="store_true",
        help="measure only what a change between prefill and decode takes, on two servers that trade places: "
        "raw values go to results/role-switch/, a profile's role_switch: to stdout",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.model not in K_MODELS:
        raise UsageError(f"no model {args.model!r}; known: {', '.join(K_MODELS)}")
    if args.role_switch:
        return role_switch(args.model)
    target = args.out or K_TOPOLOGIES / "profiles" / f"cpu-{args.model}.yaml"
    log = K_RESULTS / "profile" / f"{args.model}.log"
    if args.rounds < 0:
        raise UsageError(f"--rounds {args.rounds}: 0 or more")
    found = measure(K_MODELS[args.model], target.stem, log, tell, args.rounds)
    check(found.profile, ProfileConfig, str(target))
    text = yaml.safe_dump(found.profile, sort_keys=False, default_flow_style=None, width=110)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"# Measured by `prfaas-testbed profile {args.model}`.\n{text}", encoding="utf-8")
    if found.likeness is not None:
        record = {
            "model": args.model, "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(), "versions": versions(K_CHECKOUT / ".venv-sglang"), "machine": machine(),
            "profile": found.profile,
            "looks": [asdict(look) for look in found.looks],
            "ratios": found.likeness.ratios(), "ratios_as_measured": found.likeness.ratios(False),
            "slowness": found.likeness.slowness, "requests": found.likeness.rows(),
        }  # fmt: skip
        tell(f"raw values: {write_json(log.parent / f'{args.model}.json', record)}")
    sys.stdout.write(f"{target}\n")
    return EXIT_OK


def role_switch(name: str) -> int:
    folder = K_RESULTS / "role-switch" / stamp()
    found = measure_role_switch(K_MODELS[name], folder / "logs", tell)
    checks = [
        CheckRow(
            name="tokens-equal",
            outcome="passed" if found.tokens_equal else "failed",
            value=found.answers,
            wanted="all answers, in first roles and traded ones, alike",
        )
    ]
    run = Run(
        experiment="role-switch",
        description=f"The {name} model's servers trade places: seconds that a change of role takes.",
        commit=commit(), started=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(K_CHECKOUT / ".venv-sglang"), machine=machine(), emulation="native", checks=checks,
        files={},
    )  # fmt: skip
    measures = {"model": name, "role_switch": found.section(), "rows": found.rows}
    tell(f"raw values: {write_run(run.model_copy(update={'measures': measures}), folder)}")
    sys.stdout.write(yaml.safe_dump({"role_switch": found.section()}, default_flow_style=None, width=110))
    return EXIT_OK if found.tokens_equal else EXIT_FELL_SHORT


def tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
