"""A door that anybody may reach: what it says of that, and what a connection without a request may take."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from prfaas.router.fleet import Reported

K_KEY = {"tenant": "a", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"listen": {"host": "0.0.0.0", "port": 0}}, True),
        ({"listen": {"host": "0.0.0.0", "port": 0}, "keys": [K_KEY]}, False),
        ({"listen": {"host": "127.0.0.1", "port": 0}}, False),
    ],
    ids=["open", "with keys", "on loopback"],
)
def test_a_door_without_keys_off_loopback_says_so_when_it_starts(
    stand: Any, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], warned: bool
) -> None:
    async def main() -> None:
        async with stand(**settings):
            pass

    with caplog.at_level(logging.WARNING, logger="prfaas.router"):
        asyncio.run(main())
    assert any("no keys" in record.getMessage() for record in caplog.records) is warned


def test_a_head_that_comes_byte_by_byte_is_given_up(stand: Any) -> None:
    """Each connection takes one of `limits.max_connections`: a few bytes now and then don't keep it."""

    async def main() -> None:
        async with stand(limits={"idle_timeout_s": 0.3}) as s:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(s.url.rpartition(":")[2]))
            ended = asyncio.ensure_future(reader.read())
            try:
                for byte in b"GET /health HTTP/1.1\r\nx-filler: " + b"y" * 100:
                    writer.write(bytes([byte]))
                    done, _ = await asyncio.wait({ended}, timeout=0.05)
                    if done:
                        return
            finally:
                writer.close()
                ended.cancel()
            raise AssertionError("still open after 20 times the limit")

    asyncio.run(main())


def test_a_door_is_healthy_when_servers_have_answered_and_not_before(stand: Any) -> None:
    """A balancer that believed a door that has just started would send it what nobody serves."""

    async def main() -> None:
        async with stand(loads={"interval_s": 0.05}) as s:

            async def health() -> int:
                async with s.session.get(s.url + "/health") as response:
                    return int(response.status)

            await s.settle(lambda: all(one.reported.at_s >= 0 for one in s.router.servers))
            assert await health() == 200
            for one in s.router.servers:
                one.reported = Reported()  # as at the start
            statuses = [await health()]
            await s.settle(lambda: all(one.reported.at_s >= 0 for one in s.router.servers))
            statuses.append(await health())
            assert statuses == [503, 200]

    asyncio.run(main())
