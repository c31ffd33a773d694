"""Several sites on one machine, joined by links with real delay, loss, rate limits and faults.

with open_network(load_topology("two-sites"), workdir) as net:
    server = net.sites["west"].popen(["python", "server.py"])       # inside the site
    rows = net.calibrate(); wrong = verdict(rows)                    # is the network what was asked for?
    watch = net.watch()
    net.apply("east->west", LinkChange(rate_mbps=50))                # while load runs
    health = watch.verdict()                                         # did the emulator itself spoil it?
    net.sample().links["east->west"].bytes                           # counters, ten times a second
"""

from prfaas_testbed.network.calibrate import Calibration, verdict
from prfaas_testbed.network.health import Health, Watch
from prfaas_testbed.network.network import Applied, Captured, Network, Site
from prfaas_testbed.network.opening import open_network
from prfaas_testbed.network.ports import Connection, PortBytes
from prfaas_testbed.network.router import LinkCounters, RouterError, Sample
from prfaas_testbed.network.traffic import CrossTraffic

__all__ = [
    "Applied",
    "Calibration",
    "Captured",
    "Connection",
    "CrossTraffic",
    "Health",
    "LinkCounters",
    "Network",
    "PortBytes",
    "RouterError",
    "Sample",
    "Site",
    "Watch",
    "open_network",
    "verdict",
]
