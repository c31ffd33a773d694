"""A router's file: what its fields must be together."""

from __future__ import annotations

from typing import Any

import pytest

from prfaas.config.loading import check
from prfaas.config.router import RouterConfig
from prfaas.model.errors import ConfigError


def file(far_url: str, decode_url: str, **far: Any) -> dict[str, Any]:
    decode = {"name": "d", "role": "decode", "url": decode_url}
    prefill = {"name": "e", "role": "prefill", "url": far_url, "bootstrap_port": 8998, **far}
    sites = [{"name": "west", "servers": [decode]}, {"name": "east", "servers": [prefill]}]
    return {"models": [{"name": "m"}], "sites": sites}


@pytest.mark.parametrize("url", ["http://127.0.0.1:31000", "http://localhost:31000", "http://[::1]:31000"])
def test_a_server_behind_a_forward_says_what_decode_servers_reach_its_bootstrap_by(url: str) -> None:
    """They would dial their own loopback, and each request would wait for its first token in vain."""
    with pytest.raises(ConfigError, match=r"e: decode servers would look .* own loopback; bootstrap_host"):
        check(file(url, "http://10.2.0.6:30000"), RouterConfig, "router.yaml")
    config = check(file(url, "http://10.2.0.6:30000", bootstrap_host="10.1.0.5"), RouterConfig, "router.yaml")
    (far,) = [server for _, server in config.servers() if server.role == "prefill"]
    assert far.bootstrap == ("10.1.0.5", 8998)


def test_all_on_one_node_may_meet_on_loopback() -> None:
    check(file("http://127.0.0.1:31000", "http://localhost:30000"), RouterConfig, "router.yaml")


@pytest.mark.parametrize(
    ("movable", "east", "words"),
    [
        (True, "10.1.0.5:9400", None),
        (True, "", "all servers that prefill have `prefixes`, or none; without: e"),
        (False, "10.1.0.5:9400", "moved where the file says `movable: true`"),
        (True, "nowhere", "'nowhere' is not host:port"),
    ],
)
def test_prefixes_are_moved_between_all_servers_that_prefill_or_none(
    movable: bool, east: str, words: str | None
) -> None:
    def server(name: str, role: str, host: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "role": role, "url": f"http://{host}:30000", **more}

    data = {
        "models": [{"name": "m"}],
        "movable": movable,
        "sites": [
            {"name": "west", "servers": [
                server("p", "prefill", "10.2.0.5", bootstrap_port=8998, prefixes="10.2.0.5:9400"),
                server("d", "decode", "10.2.0.6"),
            ]},
            {"name": "east", "servers": [
                server("e", "prefill", "10.1.0.5", bootstrap_port=8998, prefixes=east)
            ]},
        ],
    }  # fmt: skip
    if words is None:
        [first, _, last] = [one for _, one in check(data, RouterConfig, "router.yaml").servers()]
        assert (first.prefixes_page, last.prefixes) == ("http://10.2.0.5:9400", "10.1.0.5:9400")
    else:
        with pytest.raises(ConfigError, match=words):
            check(data, RouterConfig, "router.yaml")
