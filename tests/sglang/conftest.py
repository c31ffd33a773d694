"""Real SGLang servers, started once for each model: plain, prefill and decode, the last two through the
backend.

A test that ends a server starts its own; the ones here serve all others.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from prfaas_testbed.instances.models import K_MODELS, TinyModel
from prfaas_testbed.instances.sglang_client import Pair
from prfaas_testbed.instances.sglang_server import (
    K_CHECKOUT,
    K_SAME_CHUNKS,
    ServerSpec,
    SglangServer,
    events_words,
    prefixes_section,
    prefixes_words,
)

K_HOST = "127.0.0.1"
K_ELSEWHERE = "127.0.0.2"
"""Of servers that have a pump of their own, and are dialled as they are."""
K_NEAR = "127.0.0.3"
"""Of a prefill server in decode's own site, which SGLang's stock engine serves."""
K_PORTS = (20000, 28000)
K_ZERO_ROOM, K_DROP_ROOM = 7_000_000_000_001, 7_000_000_000_002
"""Requests with these rooms are the controls: the prefill server damages their KV."""


_given: set[int] = set()
"""Ports that somebody will bind."""


def free_ports(n: int) -> list[int]:
    """Ports that nobody has now, and that no outgoing connection takes in the minute that a server needs to
    bind them: the kernel gives those from 32768 on.
    """
    found: list[int] = []
    while len(found) < n:
        port = random.randrange(*K_PORTS)
        with contextlib.suppress(OSError), socket.create_server((K_HOST, port)):
            if port not in _given:
                _given.add(port)
                found.append(port)
    return found


@dataclass(frozen=True)
class East:
    """A prefill server of another site, with a pump of its own that keeps the ledger of the link from there,
    and that says what it caches."""

    server: SglangServer
    pump: dict[str, Any]
    events: dict[str, Any]
    prefixes: str
    """Where it gives them."""

    @classmethod
    def of(cls, model: TinyModel, directory: Path) -> East:
        port, bootstrap_port, events, replay, prefixes = free_ports(5)
        # Far more than these requests need: the ledger admits what comes, as long as the link is up.
        link = {"peer_site": "test", "admission": {"nominal_bps": 10e9, "probe_every_s": 600}}
        socket_path = str(directory / "east.sock")
        pump = {"site": "east", "control_socket": socket_path, "idle_exit_s": 20, "links": [link]}
        path = directory / "east.yaml"
        kept = prefixes_section(K_ELSEWHERE, prefixes)
        path.write_text(yaml.safe_dump({"pump": pump, "prefixes": kept}))
        topic = {"topic": "kv-events"}
        spec = ServerSpec(
            role="prefill",
            model=model,
            model_dir=K_CHECKOUT / ".cache" / "models" / model.name,
            host=K_ELSEWHERE,
            port=port,
            bootstrap_port=bootstrap_port,
            config_path=path,
            extra_args=(*K_SAME_CHUNKS, *prefixes_words(), *events_words(events, replay)),
        )
        heard = {
            "endpoint": f"tcp://{K_HOST}:{events}",
            "replay_endpoint": f"tcp://{K_HOST}:{replay}",
            **topic,
        }
        return cls(SglangServer(spec, directory / "east.log"), pump, heard, kept["listen"])


@dataclass(frozen=True)
class Servers:
    """The servers of one model."""

    model: TinyModel
    plain: SglangServer | None
    prefill: SglangServer
    decode: SglangServer
    pair: Pair
    verify: Path
    near: SglangServer | None = None
    """A second prefill server, of decode's own site."""
    near_pair: Pair | None = None
    east: East | None = None
    prefixes: str = ""
    """Where the prefill server takes them."""

    @property
    def all(self) -> list[SglangServer]:
        east = self.east.server if self.east else None
        return [one for one in (self.plain, self.prefill, self.decode, self.near, east) if one is not None]


def write_config(directory: Path, **more: Any) -> Path:
    """The backend's file for servers of one node; `more` is merged at the top level."""
    pump = f"{K_HOST}:{free_ports(1)[0]}"
    config: dict[str, Any] = {
        "pump": {
            "site": "test",
            "listen": pump,
            "control_socket": str(directory / "pump.sock"),
            "idle_exit_s": 20,
        },
        # SGLang's bootstrap and control go as they would between sites: by the pump.
        "control": {"pumps": {K_HOST: pump}},
        "verify": {"directory": str(directory / "verify")},
        "faults": {"rooms": {K_ZERO_ROOM: "zero", K_DROP_ROOM: "drop_page"}},
    }
    for key, value in more.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    path = directory / "prfaas.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


_running: list[Servers] = []
"""A machine of 24 GB has room for one model's servers at a time, at 3 GB each."""


def start_servers(
    model_name: str, directory: Path, roles: tuple[str, ...] = ("plain", "prefill", "decode"), **options: Any
) -> Servers:
    """Start them together (most of a start is imports) and wait for all. `options`: config=, prefill_args=,
    decode_args=, decode_env= and so on; the role "near" is a prefill server of decode's own site, "east" one
    elsewhere. What fails ends what had started.
    """
    stop_running()
    model = K_MODELS[model_name]
    config = write_config(directory, **options.get("config", {}))
    names = ("plain", "prefill", "decode", "near", "bootstrap", "near bootstrap")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    servers: dict[str, SglangServer] = {}
    east = East.of(model, directory) if "east" in roles else None
    for role in roles:
        if role == "east":
            assert east is not None
            servers[role] = east.server
            continue
        near = role == "near"
        spec = ServerSpec(
            role="prefill" if near else role,  # type: ignore[arg-type]
            model=model,
            model_dir=K_CHECKOUT / ".cache" / "models" / model_name,
            host=K_NEAR if near else K_HOST,
            port=ports[role],
            bootstrap_port=ports["near bootstrap" if near else "bootstrap"],
            backend="mooncake_tcp" if near else "prfaas",
            config_path=None if near else config,
            extra_args=(*K_SAME_CHUNKS, *options.get(f"{role}_args", ())),
            extra_env=options.get(f"{role}_env", {}),
            spawn=options.get("spawn", False),
        )
        servers[role] = SglangServer(spec, directory / f"{role}.log")
    try:
        for server in servers.values():
            server.start()
        for server in servers.values():
            server.wait_ready()
    except BaseException:
        stop_all(servers.values())
        raise
    pair = Pair(servers["prefill"].url, servers["decode"].url, K_HOST, ports["bootstrap"])
    near_pair = (
        Pair(servers["near"].url, pair.decode_url, K_NEAR, ports["near bootstrap"])
        if "near" in servers
        else None
    )
    started = Servers(
        model,
        servers.get("plain"),
        servers["prefill"],
        servers["decode"],
        pair,
        directory / "verify",
        servers.get("near"),
        near_pair,
        east,
        options.get("config", {}).get("prefixes", {}).get("listen", ""),
    )
    _running.append(started)
    return started


def stop_all(servers: Iterable[SglangServer]) -> None:
    """At once, and without the seconds of grace that nothing of them needs."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(SglangServer.kill, servers))


def stop_running() -> None:
    for servers in list(_running):
        stop(servers)


def stop(servers: Servers) -> None:
    if servers in _running:
        _running.remove(servers)
    stop_all(servers.all)


@pytest.fixture(scope="session", params=["dense", "hybrid"])
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """One model's servers after the other's: pytest groups the tests by the parameter."""
    # With a radix cache on decode only what it lacks crosses; where SGLang has one for the kind of model.
    radix = ("--disaggregation-decode-enable-radix-cache",) if request.param in ("dense", "hybrid") else ()
    # KV leaves layer by layer: of each kind of model other layers are seen. By chunks it does in the servers
    # that other tests start.
    options: dict[str, Any] = {"config": {"overlap": "layer"}, "decode_args": radix}
    # These have a prefill server elsewhere that a router may choose; one a third, in decode's own site.
    if request.param in ("dense", "hybrid"):
        options["roles"] = ("plain", "prefill", "decode", "east")
        options["config"]["prefixes"] = prefixes_section(K_HOST, free_ports(1)[0])
        options["prefill_args"] = prefixes_words()
    if request.param == "dense":
        options["roles"] += ("near",)
        options["config"]["near"] = {"hosts": [K_NEAR], "transport": "tcp"}
    # One's caches, pages and states, are under SGLang's own checksum.
    if request.param == "kda":
        options["prefill_args"] = options["decode_args"] = ("--disaggregation-enable-kv-checksum",)
    # Another's decode takes pages back from requests that run, every few steps.
    # These are started as on an operator's machine, each process an interpreter of its own.
    if request.param == "mla":
        options["spawn"] = True
        options["decode_env"] = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
    started = start_servers(request.param, tmp_path_factory.mktemp(request.param), **options)
    yield started
    stop(started)


def lone_spec(
    model_name: str, directory: Path, *, extra_args: Sequence[str] = (), **changes: Any
) -> ServerSpec:
    """A prefill server on ports of its own, for a test that starts it itself. All that runs is stopped."""
    stop_running()
    directory.mkdir()
    port, bootstrap_port = free_ports(2)
    return ServerSpec(
        role="prefill",
        model=K_MODELS[model_name],
        model_dir=K_CHECKOUT / ".cache" / "models" / model_name,
        host=K_ELSEWHERE,
        port=port,
        bootstrap_port=bootstrap_port,
        config_path=write_config(directory),
        extra_args=(*K_SAME_CHUNKS, *extra_args),
        **changes,
    )


@pytest.fixture(scope="session")
def start_own() -> SimpleNamespace:
    """For tests that end servers: `start(model, directory, roles, **options)`, `stop(servers)` and
    `spec(model, directory, **changes)` of a prefill server alone; `ports(n)` that are free."""
    return SimpleNamespace(start=start_servers, stop=stop, spec=lone_spec, ports=free_ports)
