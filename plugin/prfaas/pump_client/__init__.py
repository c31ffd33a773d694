"""How SGLang's process or a profiled instance uses a pump: control channel, guards, leases, transfers."""

from prfaas.pump_client.base import Arrival, Lease, Offer, PumpClient, Region, Transfer
from prfaas.pump_client.client import LocalPumpClient
from prfaas.pump_client.lease import LocalLease

__all__ = ["Arrival", "Lease", "LocalLease", "LocalPumpClient", "Offer", "PumpClient", "Region", "Transfer"]
