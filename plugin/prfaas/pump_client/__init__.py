"""How SGLang's process or a profiled instance uses a pump: control channel, guards, leases, transfers."""

from prfaas.pump_client.base import Arrival, Lease, PumpClient, Region, Transfer
from prfaas.pump_client.client import LocalLease, LocalPumpClient

__all__ = ["Arrival", "Lease", "LocalLease", "LocalPumpClient", "PumpClient", "Region", "Transfer"]
