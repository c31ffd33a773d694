"""`python -m prfaas_testbed.experiment.inside PUMP_CONFIG`: run in a site; its pump's counters as JSON."""

from __future__ import annotations

import json
import sys

from prfaas.config.loading import load
from prfaas.config.pump import PumpConfig
from prfaas.model.errors import PrfaasError
from prfaas.pump_client import LocalPumpClient


def main(argv: list[str]) -> int:
    try:
        client = LocalPumpClient.open(load(argv[0], PumpConfig), name="testbed", start=False)
        try:
            sys.stdout.write(json.dumps(client.stats()) + "\n")
        finally:
            client.close()
    except PrfaasError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
