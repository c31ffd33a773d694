"""`prfaas-testbed profile MODEL`: a profile file measured from a real SGLang server on this machine."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import yaml

from prfaas.config.loading import check
from prfaas.config.profile import ProfileConfig
from prfaas.model.errors import EXIT_OK, UsageError
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
from prfaas_testbed.experiment.sites import write_json
from prfaas_testbed.instances.models import K_MODELS


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("profile", help="measure a real server into a profile file")
    parser.add_argument("model", help=f"one of {', '.join(K_MODELS)}")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: topologies/profiles/cpu-MODEL.yaml"
    )
    parser.add_argument(
        "--rounds", type=int, default=K_ROUNDS, metavar="N",
        help=f"rounds of requests to it and to a profiled instance in turns (default {K_ROUNDS}; 0: none)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.model not in K_MODELS:
        raise UsageError(f"no model {args.model!r}; known: {', '.join(K_MODELS)}")
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
            "ratios": found.likeness.ratios(), **asdict(found.likeness),
        }  # fmt: skip
        tell(f"raw values: {write_json(log.parent / f'{args.model}.json', record)}")
    sys.stdout.write(f"{target}\n")
    return EXIT_OK


def tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
