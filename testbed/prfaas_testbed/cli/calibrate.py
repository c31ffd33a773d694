"""`prfaas-testbed calibrate`: bring a topology up and measure whether its links are as it says."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from prfaas.config.places import checkout
from prfaas.config.topology import load_topology, network_names
from prfaas.model.errors import EXIT_FELL_SHORT, EXIT_OK
from prfaas_testbed.cli._waiting import add_wait

if TYPE_CHECKING:
    from prfaas_testbed.network import Calibration


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="measure the links of an emulated network",
        description="Brings a network up, measures RTT, rate and loss each way, says what is outside.",
    )
    known = ", ".join(network_names()) or "none"
    parser.add_argument(
        "topology",
        nargs="?",
        default="two-sites",
        help=f"a name under topologies/networks/ ({known}) or a file (%(default)s)",
    )
    parser.add_argument(
        "--emulation", choices=("native", "appliance"), help="instead of the first that works here"
    )
    add_wait(parser)
    parser.add_argument("--json", action="store_true", help="rows as one JSON object on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    topology = load_topology(args.topology)
    from prfaas_testbed.network import open_network, verdict

    workdir = checkout() / ".cache" / "testbed" / "calibrate"

    def tell(text: str) -> None:
        sys.stderr.write(f"{text}\n")

    with open_network(topology, workdir, tell, args.emulation, args.wait_s) as net:
        tell("measuring each link …")
        watch = net.watch()
        rows = net.calibrate()
        health = watch.verdict()
        emulation = net.emulation
    wrong = verdict(rows)
    if args.json:
        found: dict[str, Any] = {
            "topology": topology.name,
            "emulation": emulation,
            "scale": topology.scale.factor if topology.scale else 1,
            "calibration": [row.as_row() for row in rows],
            "health": health.as_row(),
            "inside": not wrong,
        }
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        sys.stdout.write(table(rows))
    for line in wrong:
        tell(f"outside: {line}")
    for reason in health.reasons:
        tell(f"the emulator: {reason}")
    return EXIT_FELL_SHORT if wrong else EXIT_OK


def table(rows: list[Calibration]) -> str:
    """Rows for a person: measured, and wanted in brackets."""
    lines = [f"{'direction':<18} {'RTT ms':>18} {'rate Mbit/s':>18} {'loss %':>20} {'packets':>8}  inside"]
    for row in rows:
        rtt = pair(row.measured_rtt_ms, row.wanted_rtt_ms, 2)
        rate = pair(row.measured_rate_mbps, row.wanted_rate_mbps, 1)
        loss = pair(None if row.measured_loss is None else 100 * row.measured_loss, 100 * row.wanted_loss, 3)
        inside = "yes" if row.inside else "no: " + "; ".join(row.misses)
        again = "" if row.attempt == 1 else " (again)"
        lines.append(
            f"{row.direction + again:<18} {rtt:>18} {rate:>18} {loss:>20} {row.packets:>8}  {inside}"
        )
    return "\n".join(lines) + "\n"


def pair(measured: float | None, wanted: float | None, digits: int) -> str:
    if wanted is None:
        return "no limit"
    return f"{'none' if measured is None else f'{measured:.{digits}f}'} ({wanted:.{digits}f})"
