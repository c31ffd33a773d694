"""`prfaas-testbed profile MODEL`: a profile file measured from a real SGLang server on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from prfaas.config.loading import check
from prfaas.config.profile import ProfileConfig
from prfaas.model.errors import EXIT_OK, UsageError
from prfaas_testbed.experiment.machine import K_RESULTS, K_TOPOLOGIES
from prfaas_testbed.experiment.profiling import measure
from prfaas_testbed.instances.models import K_MODELS


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("profile", help="measure a real server into a profile file")
    parser.add_argument("model", help=f"one of {', '.join(K_MODELS)}")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: topologies/profiles/cpu-MODEL.yaml"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.model not in K_MODELS:
        raise UsageError(f"no model {args.model!r}; known: {', '.join(K_MODELS)}")
    target = args.out or K_TOPOLOGIES / "profiles" / f"cpu-{args.model}.yaml"
    log = K_RESULTS / "profile" / f"{args.model}.log"
    found = measure(K_MODELS[args.model], target.stem, log, tell)
    check(found, ProfileConfig, str(target))
    text = yaml.safe_dump(found, sort_keys=False, default_flow_style=None, width=110)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"# Measured by `prfaas-testbed profile {args.model}`.\n{text}", encoding="utf-8")
    sys.stdout.write(f"{target}\n")
    return EXIT_OK


def tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
