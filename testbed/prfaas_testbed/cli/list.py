"""`prfaas-testbed list`: experiments, networks, profiles, traces, metrics, and the fields of their files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml
from pydantic import BaseModel

from prfaas.config.experiment import Experiment, ExperimentSet
from prfaas.config.fields import field_lines
from prfaas.config.profile import ProfileConfig
from prfaas.config.topology import Topology
from prfaas.model.errors import EXIT_OK
from prfaas_testbed.experiment.machine import K_TOPOLOGIES
from prfaas_testbed.experiment.metrics import K_METRICS

K_KINDS = ("experiments", "networks", "profiles", "traces", "metrics", "fields")
K_FILES: dict[str, type[BaseModel]] = {
    "network": Topology, "experiment": Experiment, "set": ExperimentSet, "profile": ProfileConfig,
}  # fmt: skip


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("list", help="what can be named: experiments, networks, …")
    parser.add_argument("kind", nargs="?", choices=K_KINDS, default="experiments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.kind == "fields":
        sys.stdout.write("".join(f"{line}\n" for line in field_lines(K_FILES)))
        return EXIT_OK
    for name, text in entries(args.kind):
        sys.stdout.write(f"{name:<24} {text}\n")
    return EXIT_OK


def entries(kind: str) -> list[tuple[str, str]]:
    if kind == "metrics":
        units = {item.name: f" ({item.unit})" if item.unit else "" for item in K_METRICS.values()}
        return [(name, K_METRICS[name].description + units[name]) for name in sorted(K_METRICS)]
    folder = K_TOPOLOGIES / kind
    if kind == "traces":
        return [(path.name, "") for path in sorted(folder.glob("*.*")) if path.is_file()]
    return [(path.stem, _text(path)) for path in sorted(folder.glob("*.yaml"))]


def _text(path: Path) -> str:
    """The file's own line about itself; a faulty file is said to be one."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return " ".join(str(data.get("description") or data.get("text") or "").split())
    except (OSError, yaml.YAMLError, AttributeError):
        return "(not readable)"
