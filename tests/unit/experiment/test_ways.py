"""How programs of one site reach servers of another: straight, or by loopback and the pumps."""

from __future__ import annotations

import pytest

from prfaas.config.experiment import Transfer
from prfaas.config.loading import check
from prfaas.config.pump import PumpConfig
from prfaas.model.errors import ConfigError
from prfaas_testbed.experiment.ways import Ways

PUMPS = {"east": "10.0.0.1:7600", "west": "10.0.0.2:7600", "north": "10.0.0.3:7600"}
SERVERS = {
    "east": [("10.0.0.1", 30000), ("10.0.0.1", 30010)], "west": [("10.0.0.2", 30020)], "north": [],
}  # fmt: skip


def test_without_any_everything_goes_straight_and_pumps_are_told_nothing() -> None:
    assert Ways().to("west", "10.0.0.1", 30000) == ("10.0.0.1", 30000)
    assert Ways().table("west") == {}
    assert Ways().pump_fields("west") == {}


def test_a_server_of_another_site_is_on_loopback_and_one_of_its_own_where_it_is() -> None:
    ways = Ways(SERVERS, PUMPS)
    assert ways.to("west", "10.0.0.1", 30010) == ("127.0.0.1", 25001)
    assert ways.to("west", "10.0.0.2", 30020) == ("10.0.0.2", 30020)
    assert ways.to("east", "10.0.0.2", 30020) == ("127.0.0.1", 25000)


def test_every_loopback_port_leads_to_an_endpoint_that_the_pump_at_its_other_end_exposes() -> None:
    ways = Ways(SERVERS, PUMPS)
    told = {site: check({"site": site, **ways.pump_fields(site)}, PumpConfig, "pump") for site in PUMPS}
    for site, config in told.items():
        for forward in config.forwards:
            assert forward.site != site
            assert forward.pump == PUMPS[forward.site]
            assert forward.to in told[forward.site].exposes
            assert ways.table(site)[forward.to] == forward.listen
    assert [len(told[site].forwards) for site in ("east", "west", "north")] == [1, 2, 3]


def test_a_site_without_a_pump_goes_straight_and_is_reached_straight() -> None:
    ways = Ways({"east": SERVERS["east"]}, {"east": PUMPS["east"]})
    assert ways.to("west", "10.0.0.1", 30000) == ("10.0.0.1", 30000)
    assert ways.pump_fields("west") == {}


@pytest.mark.parametrize("fields", [{"tls": False}, {"engine": "mooncake_tcp"}])
def test_http_by_pumps_without_encryption_or_pumps_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="http_by_pump needs"):
        check({"http_by_pump": True, **fields}, Transfer, "transfer")
