"""`prfaas plan`: how many instances, which threshold, how much bandwidth; from a case file."""

from __future__ import annotations

import argparse
from pathlib import Path

from prfaas.cli._places import place
from prfaas.config.places import checkout


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="how many instances, which threshold, how much bandwidth",
        description="Plans a case file (topologies/cases/): throughput, threshold and split, baselines at "
        "equal hardware, queues, link and instances needed, cost, sensitivity.",
    )
    parser.add_argument("case", type=Path, metavar="CASE.yaml")
    parser.add_argument("--threshold", type=float, metavar="TOKENS", help="hold the threshold")
    parser.add_argument("--prefill", type=int, metavar="N", help="hold the local prefill instances")
    parser.add_argument("--egress-gbps", type=float, metavar="G", help="another link than the case's")
    parser.add_argument("--slo-ttft-s", type=float, metavar="S", help="how many instances keep this TTFT?")
    parser.add_argument("--slo-quantile", type=float, metavar="Q", help="… for this share (0.9)")
    parser.add_argument("--slo-rate-rps", type=float, metavar="R", help="… at this rate")
    parser.add_argument("--json", action="store_true", help="one object on stdout, nothing else")
    parser.add_argument("--figures", type=place, metavar="DIR", help="draw figures (PNG, SVG, CSV) there")
    parser.add_argument(
        "--topologies",
        type=Path,
        default=checkout() / "topologies",
        help="where traces are (%(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from prfaas.cli import _plan  # numpy and the schemas take a second, which other commands needn't pay

    return _plan.run(args)
