"""A process with a busy loop and no transfer at all: the control of the host measurement."""

from __future__ import annotations

from prfaas_testbed.bench.engines.pool_worker import Pool, common_handlers
from prfaas_testbed.bench.worker import Handler


def handlers() -> dict[str, Handler]:
    pool = Pool(4096)
    return common_handlers(lambda: pool)
