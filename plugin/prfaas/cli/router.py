"""`prfaas router --config F`: the front door as a process."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys

from prfaas.config.router import load_router_config
from prfaas.model.errors import EXIT_INTERRUPTED, EXIT_OK
from prfaas.telemetry.log_lines import K_LOG_LEVELS, log_to_stderr


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "router",
        help="the OpenAI-compatible front door that decides where each prompt is prefilled",
        description="SIGHUP (or POST /reload) reads the file again; SIGTERM lets running requests end, "
        "a second one ends at once.",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML; `prfaas config fields router` tells its fields"
    )
    parser.add_argument(
        "--log-level", default="info", choices=K_LOG_LEVELS, help="of the log on stderr (info)"
    )
    parser.add_argument(
        "--check", action="store_true", help="read the file, say whether it is sound, and end"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # Imported here: other commands need neither a web server nor a tokenizer.
    import uvloop

    from prfaas.router.service import Router, serve

    log_to_stderr(args.log_level.upper())
    # A batch of one prompt gains nothing from the tokenizer's own threads, and forks would warn.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    config = load_router_config(args.config)

    async def main() -> None:
        router = Router(config, reread=lambda: load_router_config(args.config))
        if args.check:
            sys.stdout.write(f"{args.config}: router, no fault found\n")
            return
        stop, reload = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def end() -> None:
            if stop.is_set():  # asked before, and tired of waiting: what is open is cut
                os._exit(EXIT_INTERRUPTED)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        loop.add_signal_handler(signal.SIGHUP, reload.set)
        await router.start()
        # What lives now lives long: leaving it out of collections keeps their pauses short.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 50, 100)
        await serve(router, until=stop, reload=reload)

    # Threads that tokenise hand the interpreter back within this time.
    sys.setswitchinterval(0.0005)
    uvloop.run(main())
    return EXIT_OK
