"""What `prfaas plan` does: a case file to its plan, as text, JSON or figures."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from random import Random
from typing import Any

from prfaas.cli import _plan_text
from prfaas.cli._places import folder_for
from prfaas.config.case import K_MOST_RATE_RPS, CaseConfig, SitesCaseConfig, TraceLengths, load_case
from prfaas.config.lengths import lengths_of
from prfaas.config.workload import Azure, Mooncake, read_trace
from prfaas.model.errors import EXIT_OK, ConfigError, UsageError
from prfaas.model.lengths import Empirical, Lengths
from prfaas.planner import Impossible, Slo, report, sites_report, table_report
from prfaas.workload import reuse_of, timed_requests

K_QUANTILE = 0.9


def run(args: argparse.Namespace) -> int:
    case = load_case(args.case)
    file = str(args.case)
    if isinstance(case, CaseConfig):
        result = _one_link(args, case, file)
        text = _plan_text.plan_text(result)
    elif isinstance(case, SitesCaseConfig):
        _refuse(args, "several clusters")
        lengths = [_lengths(one.workload.input_tokens, args) for one in case.local]
        try:
            result = sites_report(case, lengths)
        except ValueError as error:
            raise ConfigError(file, "the file", "this system", str(error)) from None
        text = _plan_text.sites_text(result)
    else:
        _refuse(args, "a table of models")
        result = table_report(case)
        text = _plan_text.table_text(result)
    if args.figures is not None:
        from prfaas.figures.plan import draw_plan  # matplotlib takes a second to import

        for path in draw_plan(result, folder_for("--figures", args.figures)):
            sys.stderr.write(f"{path}\n")
    if args.json:
        json.dump({"case": file} | result, sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(text)
    return EXIT_OK


def _one_link(args: argparse.Namespace, case: CaseConfig, file: str) -> dict[str, Any]:
    _check(args.threshold, "--threshold", lambda x: 0 <= x < math.inf, "must be finite and not negative")
    if args.prefill is not None and not 0 <= args.prefill < case.local.instances:
        raise UsageError(
            f"--prefill: found {args.prefill}; must lie between 0 and {case.local.instances - 1}"
        )
    _check(args.egress_gbps, "--egress-gbps", lambda x: 0 <= x < math.inf, "must be finite and not negative")
    if args.egress_gbps is not None:
        link = case.prfaas.model_copy(update={"egress_gbps": args.egress_gbps})
        case = case.model_copy(update={"prfaas": link})
    slo = None
    if (args.slo_ttft_s is None) != (args.slo_rate_rps is None):
        raise UsageError("--slo-ttft-s and --slo-rate-rps go together")
    if args.slo_quantile is not None and args.slo_ttft_s is None:
        raise UsageError("--slo-quantile goes with --slo-ttft-s and --slo-rate-rps")
    if args.slo_ttft_s is not None:
        quantile = K_QUANTILE if args.slo_quantile is None else args.slo_quantile
        _check(args.slo_ttft_s, "--slo-ttft-s", lambda x: 0 < x < math.inf, "must be finite and above 0")
        _check(
            args.slo_rate_rps,
            "--slo-rate-rps",
            lambda x: 0 < x <= K_MOST_RATE_RPS,
            f"must be above 0, at most {K_MOST_RATE_RPS:g}",
        )
        _check(quantile, "--slo-quantile", lambda x: 0 < x < 1, "must lie between 0 and 1")
        slo = Slo(args.slo_ttft_s, quantile)
    lengths = _lengths(case.workload.input_tokens, args)
    try:
        return report(case, lengths, args.threshold, args.prefill, slo, args.slo_rate_rps)
    except Impossible as error:
        if slo is not None:
            raise UsageError(f"--slo-ttft-s: {error}") from None
        raise ConfigError(file, "slo.ttft_s", case.slo.ttft_s if case.slo else None, str(error)) from None


def _check(value: float | None, name: str, sound: Callable[[float], bool], allowed: str) -> None:
    """Raises UsageError for a number that was given and isn't sound."""
    if value is not None and not sound(value):
        raise UsageError(f"{name}: found {value:g}; {allowed}")


def _refuse(args: argparse.Namespace, form: str) -> None:
    for name in ("threshold", "prefill", "egress_gbps", "slo_ttft_s", "slo_quantile", "slo_rate_rps"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} doesn't go with a case of {form}")


def _lengths(config: Any, args: argparse.Namespace) -> Lengths:
    """Uncached lengths as the case means them; a trace is read and, where asked, played through a cache."""
    if not isinstance(config, TraceLengths):
        return lengths_of(config)
    trace: Mooncake | Azure
    if config.format == "azure":
        trace = Azure(kind="azure", file=config.file, max_input_tokens=config.max_tokens)
    else:
        # As recorded: reuse depends on the order alone.
        trace = Mooncake(kind="mooncake", file=config.file, max_input_tokens=config.max_tokens, bucket_s=0)
    requests = timed_requests(trace, Random(0), read_trace(config.file, args.topologies))
    if config.reuse == "none":
        return Empirical(request.prompt_tokens for request in requests)
    blocks = None
    if config.cache_tokens is not None:
        assert isinstance(trace, Mooncake)  # checked by TraceLengths
        blocks = config.cache_tokens // trace.block_tokens
    return Empirical(reuse_of(requests, config.reuse, blocks).uncached_tokens)
