"""`prfaas doctor`: what this machine has and lacks, a line each, with the command that mends it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from prfaas.cli import _facts, _findings
from prfaas.model.errors import EXIT_MACHINE, EXIT_OK, UsageError


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor", help="what this machine has and lacks, with the commands that mend it"
    )
    parser.add_argument("--rate-mbps", type=float, default=1000, help="of the link to carry (%(default)g)")
    parser.add_argument("--rtt-ms", type=float, default=40, help="of that link (%(default)g)")
    parser.add_argument(
        "--sglang-python", type=Path, metavar="PATH", help="interpreter that runs SGLang (default: this one)"
    )
    parser.add_argument("--json", action="store_true", help="one object on standard output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit 3 when something is lacking; a warning alone is 0."""
    for name, value, most in (("--rate-mbps", args.rate_mbps, 1e9), ("--rtt-ms", args.rtt_ms, 1e6)):
        if not 0 < value <= most:
            raise UsageError(f"{name}: found {value:g}; more than 0 and at most {most:g} are allowed")
    python = args.sglang_python
    if python is not None and not (python.is_file() and os.access(python, os.X_OK)):
        raise UsageError(f"--sglang-python {python}: no program that can be run")
    facts = _facts.gather(args.sglang_python, Path.cwd())
    findings = _findings.judge(facts, rate_mbps=args.rate_mbps, rtt_ms=args.rtt_ms)
    lacking = any(finding.state == "lacking" for finding in findings)
    if args.json:
        rows = [finding.row() for finding in findings]
        sys.stdout.write(json.dumps({"fit": not lacking, "findings": rows}, indent=2) + "\n")
    else:
        sys.stdout.write(_findings.lines(findings))
    return EXIT_MACHINE if lacking else EXIT_OK
