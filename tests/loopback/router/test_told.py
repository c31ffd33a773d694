"""What the router tells operators: its log, of servers and links that go and come back (a line each time, not
one for each request or question), and its metrics.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest


def said(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


def test_a_server_that_goes_and_comes_back_is_a_line_each_time(
    stand: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with stand({"west-c": "collocated"}) as s:
            handle = s.router.servers.get("west-c")
            await s.settle(lambda: handle.reported.running == 0 and handle.misses == 0)
            await s.servers["west-c"].stop()
            await s.settle(lambda: handle.misses >= 8)
            (line,) = said(caplog, "isn't used until it answers")
            assert line.startswith("west-c of west isn't used until it answers: http://127.0.0.1:")
            assert line.endswith("connection, 3 times in a row")
            assert not said(caplog, "answers again")
            await s.servers["west-c"].start()
            await s.settle(lambda: handle.misses == 0)
            assert said(caplog, "answers again") == ["west-c of west answers again"]

    with caplog.at_level(logging.INFO, "prfaas.router"):
        asyncio.run(main())


def test_a_server_whose_load_is_nonsense_is_a_line_and_serves_on(
    stand: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with stand({"west-c": "collocated"}) as s:
            s.servers["west-c"].load_body = b"{}"
            handle = s.router.servers.get("west-c")
            await s.settle(lambda: handle.misses >= 6)
            (line,) = said(caplog, "tells no load")
            assert "garbage" in line
            assert (await s.post(model="m"))[0] == 200

    with caplog.at_level(logging.INFO, "prfaas.router"):
        asyncio.run(main())


def test_a_links_page_that_cannot_be_read_is_a_line(stand: Any, caplog: pytest.LogCaptureFixture) -> None:
    link = {"source": "east", "target": "west", "status_url": "http://127.0.0.1:1/links"}

    async def main() -> None:
        async with stand(links=[link]) as s:
            refused = s.router.metrics.refused_input.labels("link_status", "connection")
            await s.settle(lambda: refused._value.get() >= 2)
            (line,) = said(caplog, "link east>west")
            assert line == "link east>west: http://127.0.0.1:1/links: connection; the file's figures hold"

    with caplog.at_level(logging.INFO, "prfaas.router"):
        asyncio.run(main())


def test_the_metrics_page_is_as_prometheus_wants_it(stand: Any, metric_faults: Any) -> None:
    async def main() -> None:
        async with stand() as s:
            await s.post(model="m")
            async with s.session.get(s.url + "/metrics") as response:
                assert metric_faults(await response.text()) == []

    asyncio.run(main())
