"""How a site's programs reach servers of another site: as they are, or by a loopback port and the two pumps.

The second is what operators do: HTTP to servers, KV events and links' status are plaintext, and cross between
sites by the pumps' one port, encrypted and authenticated. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

K_FIRST_FORWARD_PORT = 25000
K_LOOPBACK = "127.0.0.1"

Endpoint = tuple[str, int]


@dataclass(frozen=True)
class Ways:
    """Which loopback port of which site leads to which endpoint; without any, all go straight."""

    endpoints: Mapping[str, Sequence[Endpoint]] = field(default_factory=dict)
    """Of each site whose pump lets others in: what they may reach."""
    pumps: Mapping[str, str] = field(default_factory=dict)
    """Of each of these sites: host:port of its pump."""

    def _forwards(self, site: str) -> list[tuple[int, str, Endpoint]]:
        if site not in self.pumps:
            return []
        others = [(name, one) for name, own in self.endpoints.items() if name != site for one in own]
        return [(K_FIRST_FORWARD_PORT + i, name, one) for i, (name, one) in enumerate(others)]

    def to(self, site: str, host: str, port: int) -> Endpoint:
        """Where a program of `site` connects to, to speak to host:port."""
        for listen, _, endpoint in self._forwards(site):
            if endpoint == (host, port):
                return K_LOOPBACK, listen
        return host, port

    def table(self, site: str) -> dict[str, str]:
        """All of them for programs that choose themselves: host:port to host:port."""
        return {
            f"{host}:{port}": f"{K_LOOPBACK}:{listen}" for listen, _, (host, port) in self._forwards(site)
        }

    def pump_fields(self, site: str) -> dict[str, Any]:
        """What the site's pump must be told."""
        if site not in self.pumps:
            return {}
        forwards = []
        for listen, name, (host, port) in self._forwards(site):
            row = {"listen": f"{K_LOOPBACK}:{listen}", "pump": self.pumps[name], "to": f"{host}:{port}"}
            forwards.append({**row, "site": name})
        exposes = [f"{host}:{port}" for host, port in self.endpoints.get(site, ())]
        return {"forwards": forwards, "exposes": exposes}
