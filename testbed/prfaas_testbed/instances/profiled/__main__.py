"""`python -m prfaas_testbed.instances.profiled --config F`: one profiled instance, until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from pathlib import Path

import aiohttp
from aiohttp import web

from prfaas.config.loading import load
from prfaas.config.profile import find_profile
from prfaas.model.errors import MachineError, PrfaasError
from prfaas_testbed.experiment.machine import K_TOPOLOGIES
from prfaas_testbed.instances.profiled.events import EventPublisher
from prfaas_testbed.instances.profiled.face import application
from prfaas_testbed.instances.profiled.instance import Instance
from prfaas_testbed.instances.profiled.peers import K_PEER_TIMEOUT_S, HttpPeers
from prfaas_testbed.instances.profiled.pumped import open_movers
from prfaas_testbed.instances.profiled.settings import Settings

K_READY = "profiled instance ready"


async def serve(settings: Settings) -> None:
    profile = find_profile(settings.profile, K_TOPOLOGIES)
    if settings.scale != 1:
        profile = profile.scaled(settings.scale)
    publisher = None
    if settings.events_port is not None:
        replay_port = settings.events_replay_port or settings.events_port + 1
        publisher = EventPublisher(settings.host, settings.events_port, replay_port)
    timeout = aiohttp.ClientTimeout(total=K_PEER_TIMEOUT_S)
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        sender, receiver = await open_movers(settings, stack)
        instance = Instance(settings, profile, HttpPeers(session, settings.ways), sender, receiver, publisher)
        tasks = [asyncio.create_task(instance.run())]
        if publisher is not None:
            stack.callback(publisher.close)
            tasks.append(asyncio.create_task(publisher.serve_replays()))
        # A client that leaves cancels its handler, and with it the request.
        runner = web.AppRunner(application(instance), handler_cancellation=True, access_log=None)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        for port in sorted({settings.port, settings.bootstrap_port or settings.port}):
            try:
                await web.TCPSite(runner, settings.host, port).start()
            except OSError as error:
                raise MachineError(
                    f"{settings.name}: {settings.host}:{port} can't be bound: {error}"
                ) from None
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        sys.stdout.write(f"{K_READY}: {settings.name} on {settings.host}:{settings.port}\n")
        sys.stdout.flush()
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="prfaas_testbed.instances.profiled")
    parser.add_argument("--config", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        asyncio.run(serve(load(args.config, Settings)))
    except PrfaasError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
