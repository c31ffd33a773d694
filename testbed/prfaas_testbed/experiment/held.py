"""`python -m prfaas_testbed.experiment.held LIMIT_S PUMP_CONFIG URL...`: run in a site once its load is over.

Waits until its servers hold no page and no request and its pump no lease and no transfer, dropping the
servers' prefix caches: pages of a cache are free to be taken, but while it holds any, a lost page can't be
told from them. Prints what was held last, and after how long nothing was.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prfaas.config.loading import load
from prfaas.config.pump import PumpConfig
from prfaas.model.errors import PrfaasError
from prfaas.pump_client import LocalPumpClient
from prfaas_testbed.instances.sglang_client import loads, post

K_EVERY_S = 0.25


def of_server(load_row: Mapping[str, Any]) -> dict[str, int]:
    """A server's own word: pages in use, and requests in any of its queues."""
    crossing = sum(
        int(v) for k, v in (load_row.get("disaggregation") or {}).items() if k.endswith("_queue_reqs")
    )
    return {
        "pages": int(load_row["num_used_tokens"]),
        "requests": int(load_row["num_running_reqs"]) + int(load_row["num_waiting_reqs"]) + crossing,
    }


def of_pump(stats: Mapping[str, Any]) -> dict[str, int]:
    """A pump's: leases that stand, transfers that cross."""
    crossing = int(stats["incoming"]) + sum(int(peer["transfers"]) for peer in stats["peers"])
    return {"leases": int(stats["leases"]), "transfers": crossing}


def look(pump: PumpConfig | None, urls: Sequence[str]) -> dict[str, int]:
    """All that the site holds. Raises OSError or PrfaasError where one doesn't answer."""
    held = {"pages": 0, "requests": 0, "leases": 0, "transfers": 0}
    for url in urls:
        post(f"{url}/flush_cache", {}, timeout_s=5.0)
        for name, count in of_server(loads(url)).items():
            held[name] += count
    if pump is not None:
        with LocalPumpClient.open(pump, name="testbed", start=False) as client:
            for name, count in of_pump(client.stats()).items():
                held[name] += count
    return held


def main(argv: list[str]) -> int:
    limit_s, config, urls = float(argv[0]), Path(argv[1]), argv[2:]
    pump = load(config, PumpConfig) if config.exists() else None
    began_s = time.monotonic()
    held: dict[str, int] | None = None
    said = ""
    while True:
        try:
            held, said = look(pump, urls), ""
        except (OSError, PrfaasError) as error:
            held, said = None, str(error)
        waited_s = time.monotonic() - began_s
        if (held is not None and not any(held.values())) or waited_s > limit_s:
            break
        time.sleep(K_EVERY_S)
    free = held is not None and not any(held.values())
    row = {"free_s": round(waited_s, 3) if free else None, "held": held, "error": said or None}
    sys.stdout.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
