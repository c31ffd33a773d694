"""`prfaas check --peer HOST:PORT`: whether the way to a peer's pump is fit, in seconds."""

from __future__ import annotations

import argparse
import datetime
import json
import ssl
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from prfaas.cli import _facts, _findings, _link
from prfaas.cli._findings import Finding, State
from prfaas.config.backend import load_pump_config
from prfaas.config.pump import TlsConfig, is_loopback, split_address
from prfaas.model.errors import EXIT_FELL_SHORT, EXIT_OK, UsageError
from prfaas.pump import keys

K_STREAMS = (1, 4, 16)
K_RATE_S = 1.0
K_MOST_MBPS = 1e9
K_RATE_RTTS = 15  # of a rate measurement, at least: slow start takes about half of them
K_MOST_RATE_S = 3.0
K_WARN_DAYS = 14.0
K_LOSSY = 1e-3
K_GAIN = 1.1  # what more streams, or another congestion control, must bring to be called better


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "check", help="is the way to a peer fit: certificates, RTT, loss, rate, limits"
    )
    parser.add_argument(
        "--peer", required=True, metavar="HOST:PORT", help="the peer's pump, as it is dialled"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="F",
        help="this site's pump configuration, or its servers', for its keys",
    )
    parser.add_argument(
        "--keys", type=Path, metavar="DIR", help="instead: the folder that `prfaas keys` made"
    )
    parser.add_argument("--peer-site", default="", metavar="SITE", help="the site that must answer")
    parser.add_argument(
        "--plaintext", action="store_true", help="without TLS where the peer isn't on loopback"
    )
    parser.add_argument("--rate-mbps", type=float, help="what the link should carry")
    parser.add_argument(
        "--streams", default=",".join(map(str, K_STREAMS)), help="counts to try (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one object on standard output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 for a fit link, 1 for one that isn't: unreachable, untrusted, or below --rate-mbps."""
    counts = _counts(args.streams)
    if args.rate_mbps is not None and not 0 < args.rate_mbps <= K_MOST_MBPS:
        raise UsageError(
            f"--rate-mbps: found {args.rate_mbps:g}; more than 0 and at most {K_MOST_MBPS:g} are allowed"
        )
    try:
        host, _ = split_address(args.peer)
    except ValueError as error:
        raise UsageError(f"--peer: {error}") from None
    findings, rates = _examine(args, host, counts)
    lacking = any(finding.state == "lacking" for finding in findings)
    if args.json:
        found = {
            "peer": args.peer,
            "fit": not lacking,
            "findings": [finding.row() for finding in findings],
            "rates": [asdict(rate) for rate in rates],
        }
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.write(_findings.lines(findings))
    return EXIT_FELL_SHORT if lacking else EXIT_OK


def _examine(
    args: argparse.Namespace, host: str, counts: list[int]
) -> tuple[list[Finding], list[_link.Rate]]:
    findings: list[Finding] = []
    rates: list[_link.Rate] = []
    tls, our_site = _trust(args, host, findings)
    tcp = _facts.read_tcp_limits()
    try:
        with _link.Connection(args.peer, tls, our_site, args.peer_site) as connection:
            findings.append(Finding("reach", "ok", f"{args.peer} answers, protocol {connection.version}"))
            proof = "by certificate" if connection.proved else "unproved, without TLS"
            state: State = "ok" if connection.proved or is_loopback(host) else "warn"
            findings.append(Finding("peer", state, f"site {connection.site}, {proof}"))
            least_s, middle_s, most_s = _link.spread(connection.round_trips())
        figures = f"{least_s * 1e3:.2f} / {middle_s * 1e3:.2f} / {most_s * 1e3:.2f} ms (least, median, most)"
        findings.append(Finding("rtt", "ok", figures))
        for name in ("cubic", "bbr"):
            if name not in tcp.congestion_available:
                continue
            for count in counts:
                seconds = min(K_MOST_RATE_S, max(K_RATE_S, K_RATE_RTTS * least_s))
                with ExitStack() as stack:
                    streams = [
                        stack.enter_context(_link.Connection(args.peer, tls, our_site, args.peer_site, name))
                        for _ in range(count)
                    ]
                    rate = _link.measure_rate(streams, seconds)
                if rate.congestion_control == name:
                    rates.append(rate)
    except _link.LinkError as error:
        findings.append(Finding("reach", "lacking", str(error)))
        return findings, rates
    findings += judge_rates(rates, args.rate_mbps)
    best_mbps = max((rate.goodput_bps for rate in rates), default=0.0) / 1e6
    wanted_mbps = args.rate_mbps or max(best_mbps, 1.0)
    findings += _findings.congestion(tcp)
    findings.append(_findings.idle(tcp))
    findings += _findings.buffers(tcp, rate_mbps=round(wanted_mbps), rtt_ms=round(least_s * 1e3, 1))
    return findings, rates


def judge_rates(rates: list[_link.Rate], wanted_mbps: float | None) -> list[Finding]:
    """A line for each measurement, the least loss seen, and which to use. Pure."""
    if not rates:
        return [Finding("rate", "warn", "not measured: neither cubic nor bbr may be used here")]
    found = [
        Finding(
            f"{rate.congestion_control} x{rate.streams}",
            "ok",
            f"{rate.goodput_bps / 1e6:.1f} Mbit/s, {rate.loss:.2%} sent again",
        )
        for rate in rates
    ]
    # A single stream fills no queue that it needn't, so its loss is nearest to the path's own.
    loss = min(rate.loss for rate in rates)
    state: State = "warn" if loss > K_LOSSY else "ok"
    found.append(Finding("loss", state, f"{loss:.2%}, the least of the measurements"))
    best = max(rates, key=lambda rate: rate.goodput_bps)
    simplest = min(
        (rate for rate in rates if rate.goodput_bps * K_GAIN >= best.goodput_bps),
        key=lambda rate: rate.streams,
    )
    detail = (
        f"{best.goodput_bps / 1e6:.1f} Mbit/s; {simplest.congestion_control} with {simplest.streams} "
        f"stream{'s' if simplest.streams > 1 else ''} is enough for it"
    )
    if wanted_mbps is not None and best.goodput_bps < wanted_mbps * 1e6:
        short = Finding(
            "rate", "lacking", f"{detail}; {wanted_mbps:g} Mbit/s wanted", "more bandwidth, or fewer tokens"
        )
        return [*found, short]
    return [*found, Finding("rate", "ok", detail)]


def _trust(args: argparse.Namespace, host: str, findings: list[Finding]) -> tuple[ssl.SSLContext | None, str]:
    """The context to dial with and our own site. Raises UsageError for files that can't be used."""
    if args.keys is not None:
        tls = TlsConfig(site_file=args.keys / keys.K_SITE_FILE, authorities=(args.keys / keys.K_TRUSTED,))
    elif args.config is not None:
        config = load_pump_config(args.config)
        if config.tls is None:
            return None, config.site
        tls = config.tls
    elif args.plaintext or is_loopback(host):
        return None, "check"
    else:
        raise UsageError("--config F or --keys DIR is needed to dial a peer off loopback (or --plaintext)")
    identity = keys.read_identity(tls.site_file)
    days = identity.days_left(datetime.datetime.now(datetime.UTC))
    state: State = "ok" if days > K_WARN_DAYS else "warn" if days > 0 else "lacking"
    mend = "" if state == "ok" else f"prfaas keys rotate --out {tls.site_file.parent}"
    findings.append(Finding("our key", state, f"site {identity.site}, {days:.0f} days left", mend))
    if keys.is_open_to_others(tls.site_file):
        detail = f"{tls.site_file} holds a private key and is open to others"
        findings.append(Finding("our key", "warn", detail, f"chmod 600 {tls.site_file}"))
    return keys.tls_context(server=False, site_file=tls.site_file, authorities=tls.authorities), identity.site


def _counts(text: str) -> list[int]:
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = []
    if not counts or not all(1 <= count <= 64 for count in counts):
        raise UsageError(f"--streams: found {text!r}; allowed are counts from 1 to 64, as 1,4,16")
    return counts
