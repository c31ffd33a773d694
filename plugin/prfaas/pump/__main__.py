"""`python -m prfaas.pump --config F`: what a server starts when it finds no pump; `prfaas pump` calls the
same.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import signal
import sys
from collections.abc import Sequence

from prfaas.config.loading import load
from prfaas.config.pump import PumpConfig
from prfaas.model.errors import PrfaasError
from prfaas.pump.server import Pump
from prfaas.telemetry.log_lines import log_to_stderr


def run(config: PumpConfig, *, persistent: bool, log_level: str = "info") -> int:
    """Serve until SIGTERM or SIGINT; unless `persistent`, end after a while without clients."""
    log_to_stderr(log_level.upper())
    _take_descriptors()
    try:
        # The bytes of all servers wait for this process, and it never works for long at a time.
        os.setpriority(os.PRIO_PROCESS, 0, config.nice)
    except OSError:
        pass  # below 0 takes a privilege (CAP_SYS_NICE); without it the default serves
    pump = Pump(config, persistent=persistent)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: pump.stop())
    # Sent by whoever turns logs over or thinks of a reload: no reason to end. Certificates are looked at for
    # every connection; nothing else of the file can change under streams that stand.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    pump.run()
    return 0


def _take_descriptors() -> None:
    """As many as the process may have: the usual 1,024 are sixteen peers' streams. (The loop's epoll takes
    any number.)
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="prfaas.pump", allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--for-clients", action="store_true", help="end when no client is left")
    args = parser.parse_args(argv)
    try:
        return run(load(args.config, PumpConfig), persistent=not args.for_clients)
    except PrfaasError as error:
        sys.stderr.write(f"prfaas pump: {error}\n")
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
