"""The router in front of a fleet: its file, its process, and where its answers say they were prefilled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prfaas.config.experiment import Experiment
from prfaas.config.loading import load
from prfaas.config.profile import ProfileConfig, find_profile, profile_file
from prfaas_testbed.client import Answer
from prfaas_testbed.experiment.inputs import seen_profile
from prfaas_testbed.experiment.machine import K_TOPOLOGIES
from prfaas_testbed.experiment.sites import write_json
from prfaas_testbed.experiment.transfers import Moved
from prfaas_testbed.experiment.ways import Ways
from prfaas_testbed.instances.models import K_MODELS
from prfaas_testbed.instances.sglang_server import K_EVENTS_TOPIC

if TYPE_CHECKING:
    from prfaas_testbed.experiment.servers import Server
    from prfaas_testbed.network import Network

K_ROUTER_PORT = 28000
K_EVENTS_OFFSET = 2000
K_PREFIXES_OFFSET = 3000
K_STATUS_PORT = 7601
K_TOLD_SHARE = 0.8


def router_file(
    net: Network,
    experiment: Experiment,
    model: str,
    profile: str | None,
    servers: Sequence[Server],
    tokenizer: Path,
    folder: Path,
    ways: Ways,
) -> Path:
    """Write the router's configuration. Rates and profiles are scaled alike, so predicted times are right
    and what pumps tell fits them."""
    assert experiment.router is not None
    here = experiment.router.site
    scale = net.topology.scale.factor if net.topology.scale else 1.0
    served: dict[str, Any] = {"name": model, "tokenizer": str(tokenizer)}
    if "sglang" in experiment.kinds():
        hybrid, page_tokens = model in K_MODELS and K_MODELS[model].state_bytes > 0, 1
    else:
        first = profile or next(one.profile for one in experiment.instances if one.profile)
        found = find_profile(first, K_TOPOLOGIES)
        hybrid, page_tokens = found.state_bytes > 0, found.block_tokens
    served |= {"layers": "hybrid" if hybrid else "dense", "page_tokens": page_tokens}
    sites = []
    for site in net.sites:
        rows = [_server(server, experiment, ways) for server in servers if server.site == site]
        own = next((i.profile for i in experiment.instances if i.site == site and i.profile), profile)
        cost = {"profile": str(_scaled(own, scale, folder))} if own else {}
        sites.append({"name": site, "servers": rows, "cost": cost})
    directed = net.topology.emulated()
    sending = {server.site for server in servers if server.role == "prefill"}
    links = []
    for source in net.sites:
        for target in net.sites:
            if source != target:
                path = [directed[link] for link in net.path(source, target)]
                back = [directed[link] for link in net.path(target, source)]
                rates = [state.rate_mbps for state in path if state.rate_mbps is not None]
                rtt_ms = sum(state.delay_ms for state in [*path, *back])
                rate = {"rate_mbps": min(rates)} if rates else {}
                told = {}
                if experiment.transfer.estimated and source in sending and rates:
                    host, port = ways.to(here, net.sites[source].address, K_STATUS_PORT)
                    told = {"status_url": f"http://{host}:{port}/links"}
                links.append({"source": source, "target": target, "rtt_ms": rtt_ms, **rate, **told})
    config: dict[str, Any] = {
        "listen": {"host": net.sites[here].address, "port": K_ROUTER_PORT},
        "models": [served],
        "sites": sites,
        "links": links,
        "home": here,
        "policy": experiment.router.policy.model_dump(mode="json"),
        # The door's own word comes before the client gives up.
        "retry": {
            "total_s": K_TOLD_SHARE * experiment.request_timeout_s,
            "stall_s": min(120.0, K_TOLD_SHARE * experiment.request_timeout_s),
        },
        # And no seed: a router that is killed and started again would give the same rooms out once more.
        "logs": {"events": str(folder / "router-events.jsonl")},
    }
    if experiment.router.move_prefixes:
        config["movable"] = True
    if experiment.router.slow_loop is not None:
        config["slow_loop"] = experiment.router.slow_loop.model_dump(mode="json")
    return write_json(folder / "router.yaml", config)


def _server(server: Server, experiment: Experiment, ways: Ways) -> dict[str, Any]:
    assert experiment.router is not None
    here = experiment.router.site

    def to(port: int) -> str:
        host, listen = ways.to(here, server.host, port)
        return f"{host}:{listen}"

    row: dict[str, Any] = {"name": server.name, "role": server.role, "url": f"http://{to(server.port)}"}
    # Its own address, which decode servers know it by, whichever way the router takes.
    row["bootstrap_host"] = server.host
    if server.role == "prefill":
        row["bootstrap_port"] = server.bootstrap_port
    if _turns(server, experiment):
        row |= {"convertible": True, "bootstrap_port": server.bootstrap_port}
    row["ordered"] = experiment.ordered() and server.role != "decode"
    if server.role != "decode" and keeps_prefixes(server.name, experiment):
        port = server.port + K_PREFIXES_OFFSET
        # Its own address again: other sites' servers go by the pumps by themselves.
        row |= {"prefixes": f"{server.host}:{port}", "prefixes_url": f"http://{to(port)}"}
    if "profiled" in experiment.kinds() or "prefixes" in row:
        first = server.port + K_EVENTS_OFFSET
        row["kv_events"] = {
            "endpoint": f"tcp://{to(first)}",
            "replay_endpoint": f"tcp://{to(first + 1)}",
            "topic": K_EVENTS_TOPIC,
        }
    return row


def keeps_prefixes(name: str, experiment: Experiment) -> bool:
    """Whether a prefill server is a real one whose prefixes are moved."""
    real = any(one.kind == "sglang" and name in one.names() for one in experiment.instances)
    return real and experiment.router is not None and experiment.router.move_prefixes


def _turns(server: Server, experiment: Experiment) -> bool:
    """Whether the slow loop may change its role: profiled instances are ready for it as they are."""
    loop = experiment.router.slow_loop if experiment.router else None
    profiled = any(one.kind == "profiled" and server.name in one.names() for one in experiment.instances)
    return loop is not None and profiled and server.role != "collocated"


def _scaled(name: str, scale: float, folder: Path) -> Path:
    """A copy of a profile's file that the router's site sees, its bytes divided."""
    path = Path(str(seen_profile(str(profile_file(name, K_TOPOLOGIES)), folder)))
    if scale == 1:
        return path
    config = load(path, ProfileConfig).model_dump(mode="json", exclude_none=True)
    for field in ("kv_mib", "kv_bytes"):
        if field in config:
            config[field] = [size / scale for size in config[field]]
    if "kv_bytes_per_token" in config:
        config["kv_bytes_per_token"] /= scale
    config["state_bytes"] = int(config["state_bytes"] / scale)
    return write_json(path.with_name(f"scaled-{path.name}"), config)


def plain_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer for profiled instances, which are sent token ids and need none."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {"<unk>": 0, **{f"w{i}": i for i in range(1, 16)}}
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    return folder


def where_of(
    answers: Sequence[Answer], servers: Sequence[Server], moved: Mapping[int, Moved]
) -> dict[str, tuple[int, Server]]:
    """Request to (room, prefill server), by the router's headers and the prefill servers' own logs."""
    by_rid = {found.rid: room for room, found in moved.items() if found.rid}
    found: dict[str, tuple[int, Server]] = {}
    for answer in answers:
        site = answer.headers.get("x-prfaas-site")
        if site is None:
            continue
        server = next((s for s in servers if s.site == site and s.role != "decode"), None)
        if server is None:
            continue
        last = int(answer.headers.get("x-prfaas-attempts", "1")) - 1
        rid = f"{answer.headers.get('x-prfaas-request-id', '')}-{last:02d}"
        room = int(answer.headers.get("x-prfaas-room", by_rid.get(rid, 0)))
        found[answer.id] = (room, server)
    return found
