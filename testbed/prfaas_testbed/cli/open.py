"""`prfaas-testbed open`: a network for programs of one's own, without an experiment."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from prfaas.config.loading import check
from prfaas.config.timeline import directed
from prfaas.config.topology import LinkChange, load_topology
from prfaas.model.errors import EXIT_FELL_SHORT, EXIT_OK, PrfaasError, UsageError
from prfaas_testbed.cli._waiting import add_wait

if TYPE_CHECKING:
    from prfaas_testbed.network import Network

K_ABOUT = """Brings a network up and leaves it to you. What --run says is done by sh on this machine, with
IN_SITE (the words that run a program in that site) and ADDRESS_SITE of each site in its environment; the
network goes down when it ends. Without it the network stays up until Ctrl-C or the end of the input, each
line of which changes a link: `east->west loss_percent=1 rate_mbps=20` one way, `east<->west down=true` both.
What has fields of its own is JSON: bursty_loss={"enter_percent":1,"leave_percent":25}.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "open", help="bring a network up for programs of your own", description=K_ABOUT
    )
    parser.add_argument("topology", help="a name under topologies/networks/, or a file")
    parser.add_argument(
        "--emulation", choices=("native", "appliance"), help="instead of the first that works here"
    )
    add_wait(parser)
    parser.add_argument("--run", dest="script", metavar="COMMANDS", help="'$IN_east ping -c 3 $ADDRESS_west'")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    topology = load_topology(args.topology)
    from prfaas_testbed.network import open_network

    # Of what one has in /tmp, sites see the folder that one stands in.
    with open_network(topology, Path.cwd(), _tell, args.emulation, args.wait_s) as net:
        for name, site in net.sites.items():
            _tell(f"{name:<10} {site.address:<15} mnexec -a {site.pid} PROGRAM …")
        if args.script is not None:
            return _run_script(net, args.script)
        try:
            for line in sys.stdin.buffer:
                _change(net, line.decode(errors="replace"))
        except KeyboardInterrupt:  # the way to end it
            pass
    return EXIT_OK


def _run_script(net: Network, script: str) -> int:
    sites = {
        f"{what}_{name}": text
        for name, site in net.sites.items()
        for what, text in (("IN", f"mnexec -a {site.pid}"), ("ADDRESS", site.address))
    }
    shell = subprocess.Popen(["sh", "-c", script], env={**os.environ, **sites})
    try:
        status = shell.wait()
    finally:
        if shell.poll() is None:  # a signal to us alone: what it started would stay without it
            for child in psutil.Process(shell.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.terminate()
            shell.kill()
            shell.wait()
    if status:
        _tell(f"the commands ended with status {status}")
    return EXIT_FELL_SHORT if status else EXIT_OK


def _change(net: Network, line: str) -> None:
    """Tells of a fault, the line's or the link's; the network stays."""
    try:
        links, change = read_change(line)
        for link in links:
            applied = net.apply(link, change)
            _tell(f"{link} changed, known within {applied.uncertainty_s * 1e3:.1f} ms")
    except PrfaasError as error:
        _tell(str(error))


def read_change(line: str) -> tuple[list[str], LinkChange]:
    """The links of a line of input and what to make of them; none for an empty one. Raises UsageError."""
    words, *settings = line.split() or [""]
    if not words:
        return [], LinkChange(down=False)
    fields: dict[str, Any] = {}
    for one in settings:
        name, equals, value = one.partition("=")
        if not equals:
            raise UsageError(f"{one!r}: expected FIELD=VALUE, as loss_percent=1")
        if name in fields:
            raise UsageError(f"{name} is there a second time; expected each field once")
        try:
            fields[name] = json.loads(value)
        except (ValueError, RecursionError):  # no JSON: the field says what it takes
            fields[name] = value
    return directed(words), check(fields, LinkChange, words)


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
