"""Configurations that the pages show are ones that the programs take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from prfaas.config.backend import BackendConfig, load_backend_config
from prfaas.config.loading import Strict, check
from prfaas.config.pump import PumpConfig
from prfaas.config.router import RouterConfig, load_router_config
from prfaas.telemetry.pump_metrics import K_INBOUND_COUNTERS, PumpMetrics
from prfaas.telemetry.router_metrics import RouterMetrics
from prfaas_testbed.cli.main import main as run_testbed

K_ROOT = Path(__file__).parents[3]
K_BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
K_PAGES = ("README.md", "plugin/prfaas/router/README.md", "plugin/prfaas/sglang/README.md")


def blocks(page: str) -> list[str]:
    return K_BLOCK.findall((K_ROOT / page).read_text(encoding="utf-8"))


def kind_of(fields: dict[str, object]) -> type[Strict]:
    return RouterConfig if "models" in fields else BackendConfig


@pytest.mark.parametrize(
    ("page", "text"),
    [(page, text) for page in K_PAGES for text in blocks(page)],
    ids=lambda value: value[:24],
)
def test_what_a_page_shows_is_taken(page: str, text: str) -> None:
    fields = yaml.safe_load(text)
    pump = {"pump": {"site": "west"}} if "models" not in fields and "pump" not in fields else {}
    check(fields | pump, kind_of(fields), page)


def test_examples_are_taken_and_find_each_other() -> None:
    at_east, at_west = (
        load_backend_config(K_ROOT / "examples" / f"{site}.yaml") for site in ("east", "west")
    )
    router = load_router_config(K_ROOT / "examples/router.yaml")
    assert at_west.control
    assert set(at_west.control.pumps.values()) == {at_east.pump.advertise}
    assert {forward.pump for forward in at_west.pump.forwards} == {at_east.pump.advertise}
    forwarded = {forward.listen: forward.to for forward in at_west.pump.forwards}
    prefill = next(server for _, server in router.servers() if server.role == "prefill")
    assert forwarded[prefill.url.removeprefix("http://")].startswith(f"{prefill.bootstrap_host}:")
    assert prefill.kv_events
    for endpoint in (prefill.kv_events.endpoint, prefill.kv_events.replay_endpoint or ""):
        assert forwarded[endpoint.removeprefix("tcp://")] in at_east.pump.exposes
    page = (router.links[0].status_url or "").removeprefix("http://").removesuffix("/links")
    assert forwarded[page] == at_east.pump.metrics
    assert at_east.pump.metrics in at_east.pump.exposes
    assert [f"{at_east.pump.site}>{link.peer_site}" for link in at_east.pump.links] == [
        f"{link.source}>{link.target}" for link in router.links
    ]


def test_what_rules_and_the_page_ask_prometheus_for_is_there() -> None:
    """Names of metrics in the examples' rules and in OPERATING.md, of which some stand as `a_{b,c}`."""
    inbound = dict.fromkeys((*K_INBOUND_COUNTERS, "streams"), 0) | {"refusals": {}}
    forwards = {"connections": 0, "opened": 0, "failed": 0}
    stats = {
        "site": "", "address": "", "version": "", "protocol_versions": (1, 1), "certificates": [],
        "peers": [],
        "inbound": inbound, "forwards": forwards, "forwarded_in": 0, "links": [], "ended": {}, "leases": 0,
        "incoming": 0, "clients": 0, "cpu_user_s": 0.0, "cpu_system_s": 0.0,
    }  # fmt: skip
    pages = PumpMetrics().page(stats) + RouterMetrics().page()
    there = set(re.findall(r"^# HELP (\S+) ", pages.decode(), re.M))
    rules = yaml.safe_load((K_ROOT / "examples/alerts.yaml").read_text())["groups"][0]["rules"]
    text = " ".join(rule["expr"] for rule in rules) + (K_ROOT / "OPERATING.md").read_text()
    spread = re.sub(
        r"(prfaas_\w+_)\{([a-z_,]+)\}",
        lambda found: " ".join(found[1] + end for end in found[2].split(",")),
        text,
    )
    asked = set(re.findall(r"\b(?:prfaas_(?:pump|link|router)_\w+|process_\w+)", spread))
    assert len(asked) > 20
    assert {name.removesuffix("_bucket") for name in asked} - there == set()


def test_the_testbeds_page_leads_to_a_network_and_an_experiment_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offices, nightly = blocks("testbed/README.md")
    (tmp_path / "offices.yaml").write_text(offices)
    (tmp_path / "nightly.yaml").write_text(nightly)
    assert run_testbed(["run", str(tmp_path / "nightly.yaml"), "--dry-run"]) == 0
    assert "offices (3 sites, 6 links)" in capsys.readouterr().out


def test_two_sites_of_the_readme_find_each_other() -> None:
    """What one says of itself is what the other dials."""
    east, west, router = (yaml.safe_load(text) for text in blocks("README.md"))
    at_east, at_west = (check(one["pump"], PumpConfig, "README.md") for one in (east, west))
    (forward,) = at_west.forwards
    assert forward.pump == at_east.advertise
    assert set(west["control"]["pumps"].values()) == {at_east.advertise}
    assert at_west.advertise not in ("", at_east.advertise)
    servers = {server.name: server for _, server in check(router, RouterConfig, "README.md").servers()}
    far = next(server for server in servers.values() if server.role == "prefill")
    assert far.url == f"http://{forward.listen}"
    assert f"{far.bootstrap_host}" in west["control"]["pumps"], "decode servers would dial their own loopback"
