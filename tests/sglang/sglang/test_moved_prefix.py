"""A prefix that only east's server holds reaches west's cache by our pumps, by SGLang's seam for an external
cache (prfaas_cpu/prefix_linker.py), and west reuses exactly that."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prfaas.config.loading import check
from prfaas.config.pump import PumpConfig
from prfaas.pump_client import LocalPumpClient
from prfaas_testbed.experiment.profiling import K_HOST, free_ports
from prfaas_testbed.instances.models import K_MODELS, TinyModel
from prfaas_testbed.instances.sglang_client import post, prompt_of
from prfaas_testbed.instances.sglang_server import K_CHECKOUT, K_SAME_CHUNKS, ServerSpec, SglangServer

K_PREFIX, K_REST = prompt_of(900, 5), prompt_of(60, 6)
K_ADDED = 0.2
"""What frames and answers add at most, of the bytes: a page is a token here, in pieces of 128 bytes."""


@dataclass
class Sites:
    model: TinyModel
    east: SglangServer
    west: SglangServer
    pump: dict[str, Any]
    """East's."""
    linker: str
    """Where east's is asked."""

    def given_bytes(self) -> int:
        """Of KV and states, that east gave."""
        status, told = post(f"{self.linker}/given", {})
        assert status == 200
        return int(told["bytes"])

    def added_bytes(self) -> int:
        """Of all that east's pump sent, by the kernel's acknowledgements: less blocks and their repeats."""
        config = check(self.pump, PumpConfig, "test")
        with LocalPumpClient.open(config, name="look", start=False) as client:
            stats: Any = client.stats()
        acked = sum(stream["acked_bytes"] for peer in stats["peers"] for stream in peer["streams"])
        return int(acked - sum(peer["payload_bytes_sent"] for peer in stats["peers"]))


def ask(server: SglangServer, tokens: list[int], output: int = 16) -> tuple[list[int], int]:
    """The answer, and how much of the prompt was reused."""
    sampling = {"temperature": 0, "max_new_tokens": output, "ignore_eos": True}
    status, answer = post(server.url + "/generate", {"input_ids": tokens, "sampling_params": sampling}, 120)
    assert status == 200, answer
    return answer["output_ids"], answer["meta_info"]["cached_tokens"]


@pytest.fixture(params=["dense", "hybrid"])
def sites(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sites]:
    model = K_MODELS[request.param]
    east_port, west_port, east_own, west_own = free_ports(4)
    pumps = {
        site: {"site": site, "control_socket": str(tmp_path / f"{site}.sock"), "idle_exit_s": 5}
        for site in ("east", "west")
    }

    def server(site: str, port: int, extra: dict[str, Any]) -> SglangServer:
        linker = {
            "linker": "PrefixLinker",
            "linker_module_path": "prfaas_cpu.prefix_linker",
            "linker_extra_config": {"pump": pumps[site], **extra},
        }
        words = (
            "--enable-unified-cache-external-linker",
            *("--unified-cache-external-linker-backend", "dynamic"),
            *("--unified-cache-external-linker-config", json.dumps(linker)),
        )
        spec = ServerSpec(
            role="plain", model=model, model_dir=K_CHECKOUT / ".cache" / "models" / model.name, host=K_HOST,
            port=port, extra_args=(*K_SAME_CHUNKS, *words),
        )  # fmt: skip
        return SglangServer(spec, tmp_path / f"{site}.log")

    east = server("east", east_port, {"listen": f"{K_HOST}:{east_own}"})
    peer = {"listen": f"{K_HOST}:{west_own}", "peer": f"http://{K_HOST}:{east_own}"}
    west = server("west", west_port, peer)
    try:
        for one in (east, west):
            one.start()
        for one in (east, west):
            one.wait_ready()
        yield Sites(model, east, west, pumps["east"], peer["peer"])
    finally:
        for one in (east, west):
            one.stop()


@pytest.mark.timeout(600)
@pytest.mark.skipif(not os.environ.get("PRFAAS_LONG_TESTS"), reason="minutes: set PRFAAS_LONG_TESTS=1")
def test_a_prefix_that_only_east_holds_is_reused_in_west_to_the_token(sites: Sites) -> None:
    prompt = K_PREFIX + K_REST
    wanted, cached = ask(sites.west, prompt)
    assert cached == 0, "nobody holds any of it"
    assert post(sites.west.url + "/flush_cache", {})[0] == 200
    ask(sites.east, K_PREFIX, 1)
    time.sleep(1.0)  # east's own cache takes it in after the answer
    assert sites.given_bytes() == 0
    assert ask(sites.west, prompt) == (wanted, len(K_PREFIX))
    kv_and_state = len(K_PREFIX) * sites.model.kv_bytes_per_token + sites.model.state_bytes
    assert sites.given_bytes() == kv_and_state
    assert 0 < sites.added_bytes() < K_ADDED * kv_and_state
    # Pages are west's own from then on; a state it has at the end of its own prompt alone.
    assert ask(sites.west, K_PREFIX + prompt_of(40, 9))[1] == len(K_PREFIX)
    assert sites.given_bytes() == kv_and_state * (2 if sites.model.state_bytes else 1)
    # And without east what is missing is computed.
    sites.east.stop()
    assert ask(sites.west, prompt_of(300, 11))[1] == 0
