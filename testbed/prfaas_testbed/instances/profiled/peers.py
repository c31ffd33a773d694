"""How profiled instances of different sites speak to each other: HTTP, with kept connections."""

from __future__ import annotations

from typing import Any

import aiohttp

from prfaas_testbed.instances.profiled.instance import Refused

K_PEER_TIMEOUT_S = 10.0


class HttpPeers:
    """Peers over HTTP with kept connections."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def post(self, address: tuple[str, int], path: str, body: dict[str, Any]) -> None:
        url = f"http://{address[0]}:{address[1]}{path}"
        try:
            async with self._session.post(url, json=body) as response:
                if response.status != 200:
                    raise Refused(f"{url}: HTTP {response.status}: {(await response.text())[:200]}")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Refused(f"{url}: {error or type(error).__name__}") from None
