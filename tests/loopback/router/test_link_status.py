"""The router reads its links' estimates from a real pump's page: rate, backlog, outage and recovery."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prfaas.config.pump import PumpConfig
from prfaas.model.ids import LinkId
from prfaas.pump_client import LocalPumpClient
from prfaas.pump_client.launch import connect

K_NOMINAL_BPS = 80e6
K_LINK = LinkId("east", "west")


class PumpProcess:
    """One pump, started and ended by the test."""

    def __init__(self, folder: Path, site: str, **fields: object) -> None:
        self.config = PumpConfig.model_validate(
            {"site": site, "control_socket": folder / f"{site}.sock", **fields}
        )
        self._file, self._log = folder / f"{site}.yaml", folder / f"{site}.log"
        self._file.write_text(self.config.model_dump_json(exclude_none=True))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prfaas.pump", "--config", str(self._file)], stdout=log, stderr=log
            )
        end = time.monotonic() + 30
        while (found := connect(self.config.control_path)) is None:
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.02)
        found.close()

    def tell(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def end(self) -> None:
        if self.process is not None:
            self.tell(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(30)
            self.process = None


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def pumps(tmp_path: Path) -> Iterator[tuple[PumpProcess, PumpProcess, str]]:
    """East's, which keeps the ledger of east>west, west's, and the address of east's page."""
    page = f"127.0.0.1:{free_port()}"
    admission = {"nominal_bps": K_NOMINAL_BPS, "reserved_share": 0.25, "outage_after_s": 0.5}
    east = PumpProcess(
        tmp_path, "east", metrics=page, links=[{"peer_site": "west", "admission": admission}], stall_s=60
    )
    west = PumpProcess(tmp_path, "west")
    try:
        for pump in (east, west):
            pump.start()
        yield east, west, f"http://{page}/links"
    finally:
        for pump in (east, west):
            pump.end()


def settings(url: str) -> dict[str, Any]:
    link = {"source": "east", "target": "west", "rate_mbps": 10_000, "rtt_ms": 1, "status_url": url}
    return {"links": [link], "loads": {"interval_s": 0.05, "max_age_s": 2.0}}


def test_the_pumps_estimate_takes_the_configured_figures_place_while_it_is_heard(
    stand: Any, pumps: tuple[PumpProcess, PumpProcess, str]
) -> None:
    async def main() -> None:
        east, _, url = pumps
        async with stand(**settings(url)) as s:
            links = s.router.links

            def rate_bps() -> float:
                return links.estimates(s.router.clock())[K_LINK].rate_bps

            await s.settle(lambda: rate_bps() == K_NOMINAL_BPS, 20)
            found = links.estimates(s.router.clock())[K_LINK]
            assert found.up
            assert found.reserved_bps == K_NOMINAL_BPS / 4
            assert found.rtt_s == 0.001, "a round trip that the pump hasn't measured is the configured one"
            async with s.session.get(s.url + "/health") as response:
                page = await response.json()
            assert page["links"]["east>west"]["rate_bps"] == K_NOMINAL_BPS
            await asyncio.to_thread(east.end)
            await s.settle(lambda: rate_bps() == 10e9, 20)
            metrics = await s.metrics()
            refused = 'prfaas_router_refused_input_total{cause="connection",source="link_status"}'
            assert metrics[refused] >= 1
            await asyncio.to_thread(east.start)
            await s.settle(lambda: rate_bps() == K_NOMINAL_BPS, 20)

    asyncio.run(main())


def test_an_outage_that_the_pump_sees_keeps_long_prompts_at_home_until_it_is_over(
    stand: Any, long_text: str, pumps: tuple[PumpProcess, PumpProcess, str]
) -> None:
    async def main() -> None:
        east, west, url = pumps
        size = 4 << 20
        with contextlib.ExitStack() as stay:
            sender, receiver = (
                stay.enter_context(contextlib.closing(LocalPumpClient.open(one.config, start=False)))
                for one in (east, west)
            )
            memory = [np.full(size, fill, np.uint8) for fill in (7, 0)]
            for client, array in zip((sender, receiver), memory, strict=True):
                client.register([(array.ctypes.data, size)])

            def send() -> Any:
                rows = [np.array([array.ctypes.data], np.uint64) for array in memory]
                lengths = np.array([size], np.uint64)
                return sender.submit_raw(receiver.session_id, *rows, lengths, deadline_s=60)

            assert send().wait(30).ok
            async with stand(**settings(url)) as s:

                def up() -> bool:
                    return s.router.links.estimates(s.router.clock())[K_LINK].up

                async def site() -> str:
                    status, headers, _ = await s.post("/v1/completions", prompt=long_text)
                    assert status == 200
                    return headers["x-prfaas-site"]

                await s.settle(lambda: s.router.links.states()[0].told is not None, 20)
                assert await site() == "east"
                west.tell(signal.SIGSTOP)
                under_way = send()
                await s.settle(lambda: not up(), 30)
                assert await site() == "west"
                west.tell(signal.SIGCONT)
                assert (await asyncio.to_thread(under_way.wait, 30)).ok
                await s.settle(up, 30)
                assert await site() == "east"

    asyncio.run(main())
