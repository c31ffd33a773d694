"""How profiled instances of different sites speak to each other: HTTP, with kept connections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import aiohttp

K_PEER_TIMEOUT_S = 10.0


class Refused(Exception):
    """The request can't be served; `status` is HTTP's."""

    def __init__(self, message: str, status: int = 500) -> None:
        super().__init__(message)
        self.status = status


class Peers(Protocol):
    """How a decode instance reaches the prefill instance of a room, and back."""

    async def post(self, address: tuple[str, int], path: str, body: dict[str, Any]) -> None:
        """Raises Refused."""
        ...


class HttpPeers:
    """Peers over HTTP with kept connections."""

    def __init__(self, session: aiohttp.ClientSession, ways: Mapping[str, str] | None = None) -> None:
        """`ways`: host:port to the host:port that leads there, where that isn't the same."""
        self._session, self._ways = session, dict(ways or {})

    async def post(self, address: tuple[str, int], path: str, body: dict[str, Any]) -> None:
        place = f"{address[0]}:{address[1]}"
        url = f"http://{self._ways.get(place, place)}{path}"
        try:
            async with self._session.post(url, json=body) as response:
                if response.status != 200:
                    raise Refused(f"{url}: HTTP {response.status}: {(await response.text())[:200]}")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Refused(f"{url}: {error or type(error).__name__}") from None
