"""Configurations that the pages show are ones that the programs take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from prfaas.config.backend import BackendConfig
from prfaas.config.loading import Strict, check
from prfaas.config.pump import PumpConfig
from prfaas.config.router import RouterConfig

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
