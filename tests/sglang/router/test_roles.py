"""The slow loop on real SGLang servers: one turns from decode to prefill, and back when the traffic changes.

Answers keep coming meanwhile, and their tokens stay the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from prfaas.config.loading import check
from prfaas.config.router import RouterConfig
from prfaas.router.service import Router
from prfaas_testbed.instances.sglang_client import prompt_of
from prfaas_testbed.instances.sglang_server import SglangServer

K_HOST = "127.0.0.1"
K_SWITCH_ARGS = ("--enable-pd-role-switch", "--disaggregation-decode-retraction-backup", "cpu_tensor")
K_WITHIN_S = 90.0


@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not os.environ.get("PRFAAS_LONG_TESTS"), reason="three more servers, minutes: set PRFAAS_LONG_TESTS=1"
)
def test_a_server_turns_to_prefill_and_back_as_the_traffic_asks(start_own: Any, tmp_path: Path) -> None:
    base = start_own.spec("dense", tmp_path / "servers", extra_args=K_SWITCH_ARGS)
    roles = {"west-p": "prefill", "west-d": "decode", "west-e": "decode"}
    servers, rows = [], []
    for name, role in roles.items():
        port, bootstrap = start_own.ports(2)
        spec = replace(base, role=role, port=port, bootstrap_port=bootstrap)
        servers.append(SglangServer(spec, tmp_path / f"{name}.log"))
        rows.append(
            {"name": name, "role": role, "url": spec.url, "bootstrap_port": bootstrap, "convertible": True}
        )
    config = {
        "listen": {"port": 0},
        "models": [{"name": "tiny", "tokenizer": str(base.model_dir)}],
        "sites": [{"name": "west", "cost": {"prefill_tokens_per_s": 500}, "servers": rows}],
        "policy": {"name": "homogeneous"},
        "retry": {"first_token_min_s": 60, "total_s": 240},
        "loads": {"timeout_s": 10.0},
        "slow_loop": {
            "dry_run": False,
            "look_every_s": 1.0,
            "patience": 2,
            "settle_s": 1.0,
            "least_requests": 4,
            "window_s": 12.0,
        },
    }
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready()
        asyncio.run(_turn(check(config, RouterConfig, "test")))
    finally:
        for server in servers:
            server.stop()


async def _turn(config: RouterConfig) -> None:
    router = Router(config)
    host, port = await router.start()
    url = f"http://{host}:{port}/generate"
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:

            async def ask(tokens: int, seed: int, output: int) -> list[int]:
                sampling = {"temperature": 0, "max_new_tokens": output, "ignore_eos": True}
                body = {"input_ids": prompt_of(tokens, seed), "sampling_params": sampling}
                async with session.post(url, json=body) as response:
                    answer = await response.json()
                    assert response.status == 200, answer
                    found: list[int] = answer["output_ids"]
                    return found

            async def until(prefills: int, tokens: int, output: int) -> None:
                """Such requests, two at a time, until so many servers prefill and none is converting."""
                end, seed = time.monotonic() + K_WITHIN_S, 100
                while True:
                    now = [one.role.value for one in router.servers if not one.converting]
                    if len(now) == 3 and now.count("prefill") == prefills:
                        return
                    assert time.monotonic() < end, router.roles.page()
                    seed += 2
                    await asyncio.gather(ask(tokens, seed, output), ask(tokens, seed + 1, output))

            wanted = await ask(300, 1, 8)
            await until(2, 400, 2)
            assert await ask(300, 1, 8) == wanted
            await until(1, 20, 96)
            assert await ask(300, 1, 8) == wanted
            steps = [step for step in router.roles.steps if step.seconds is not None]
            assert [step.role for step in steps] == ["prefill", "decode"]
            assert all(step.reason.startswith("switched") for step in steps), steps
            for step in steps:
                logging.getLogger(__name__).info("to %s in %.3f s", step.role, step.seconds)
    finally:
        await router.stop()
