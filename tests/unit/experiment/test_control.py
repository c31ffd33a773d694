"""Whether SGLang's own control between sites goes by the pumps, as a check tells it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from prfaas.config.experiment import Transfer
from prfaas.config.run import EventRow
from prfaas_testbed.experiment.fleet import K_PUMP_PORT
from prfaas_testbed.experiment.metrics import K_METRICS, Unsupported
from prfaas_testbed.experiment.watch import in_clear
from prfaas_testbed.network.ports import Connection


@pytest.mark.parametrize(("http_by_pump", "count"), [(False, 2), (True, 3)])
def test_only_what_is_neither_the_pumps_nor_http_that_may_counts_as_in_clear(
    http_by_pump: bool, count: int
) -> None:
    seen = [
        Connection(40000, "10.0.1.2", K_PUMP_PORT),
        Connection(K_PUMP_PORT, "10.0.1.2", 40001),
        Connection(40002, "10.0.1.2", 30000),  # HTTP of a server there
        Connection(40003, "10.0.2.2", 45000),  # within the site
        Connection(40004, "10.0.1.2", 30001),  # its bootstrap
        Connection(45001, "10.0.1.2", 40005),  # a rank's socket here
    ]
    net: Any = SimpleNamespace(
        sites={"east": SimpleNamespace(address="10.0.1.2"), "west": SimpleNamespace(address="10.0.2.2")},
        connections=lambda site: seen,
    )
    experiment = SimpleNamespace(transfer=Transfer(http_by_pump=http_by_pump))
    fleet: Any = SimpleNamespace(servers=[SimpleNamespace(port=30000)], experiment=experiment)
    assert in_clear(net, fleet, "west") == count


def test_all_that_left_a_site_beside_its_pump_is_counted_over_all_sites() -> None:
    rows = [
        EventRow.model_validate({"at_s": 1.0, "event": "accounting", "outside_pumps_bytes": n})
        for n in (0, 104)
    ]
    view: Any = SimpleNamespace(events=lambda name: rows)
    assert K_METRICS["outside_pumps_bytes"].compute(view) == 104
    unknown: Any = SimpleNamespace(events=lambda name: [])
    with pytest.raises(Unsupported, match="no site counted"):
        K_METRICS["outside_pumps_bytes"].compute(unknown)


@pytest.mark.parametrize(("forwarded", "clear", "share"), [(3, 0, 1.0), (3, 1, 0.75), (0, 2, 0.0)])
def test_the_share_by_the_pumps_is_of_all_such_connections(forwarded: int, clear: int, share: float) -> None:
    row = {"at_s": 1.0, "event": "accounting", "forwarded": forwarded, "in_clear": clear}
    rows = [EventRow.model_validate(row)]
    view: Any = SimpleNamespace(events=lambda name: rows)
    assert K_METRICS["control_by_pump_share"].compute(view) == share
