"""Several sites on one machine, joined by links with real delay, loss, rate limits and faults."""

from prfaas_testbed.network.network import Applied, Network, Site, open_network
from prfaas_testbed.network.router import LinkCounters, RouterError, Sample

__all__ = ["Applied", "LinkCounters", "Network", "RouterError", "Sample", "Site", "open_network"]
