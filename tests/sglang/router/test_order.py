"""The router's order of service on a real SGLang server: by deadline, whatever the order of arrival."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from prfaas.config.loading import check
from prfaas.config.router import RouterConfig
from prfaas.router.service import Router
from prfaas_testbed.instances.sglang_client import prompt_of
from prfaas_testbed.instances.sglang_server import K_BY_PRIORITY, SglangServer

K_ONE_AT_A_TIME = ("--max-running-requests", "1")


@pytest.mark.timeout(400)
@pytest.mark.skipif(
    not os.environ.get("PRFAAS_LONG_TESTS"), reason="a server of its own, a minute: set PRFAAS_LONG_TESTS=1"
)
def test_what_waits_at_a_real_server_is_served_by_deadline(start_own: Any, tmp_path: Path) -> None:
    (port,) = start_own.ports(1)
    base = start_own.spec("dense", tmp_path / "server", extra_args=(*K_BY_PRIORITY, *K_ONE_AT_A_TIME))
    spec = replace(base, role="plain", port=port, bootstrap_port=None)
    server = {"name": "west-s", "role": "collocated", "url": spec.url, "ordered": True}
    config = {
        "listen": {"port": 0},
        "models": [{"name": "tiny", "tokenizer": str(base.model_dir)}],
        "sites": [{"name": "west", "cost": {"prefill_tokens_per_s": 500}, "servers": [server]}],
        "policy": {"name": "collocated", "service": "deadline"},
        "retry": {"first_token_min_s": 60, "total_s": 240},
        "loads": {"timeout_s": 10.0},
    }
    with SglangServer(spec, tmp_path / "server.log") as running:
        running.wait_ready()
        ended = asyncio.run(_ask_in_a_burst(check(config, RouterConfig, "test")))
    assert ended == ["running", "soon", "middle", "late"]


async def _ask_in_a_burst(config: RouterConfig) -> list[str]:
    """Names in order of their ends: one long request that runs, then three that come while it does."""
    router = Router(config)
    host, port = await router.start()
    ended: list[str] = []
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=200)) as session:

            async def ask(name: str, tokens: int, output: int, within_s: float) -> None:
                sampling = {"temperature": 0, "max_new_tokens": output, "ignore_eos": True}
                body = {"input_ids": prompt_of(tokens, len(ended) + tokens), "sampling_params": sampling}
                headers = {"x-prfaas-first-token-ms": str(int(1e3 * within_s))}
                url = f"http://{host}:{port}/generate"
                async with session.post(url, json=body, headers=headers) as response:
                    answer = await response.json()
                    assert response.status == 200, answer
                    ended.append(name)

            await ask("warm", 100, 2, 60)
            ended.clear()
            asking = [asyncio.create_task(ask("running", 1000, 600, 10))]
            await asyncio.sleep(1.0)
            for name, within_s in (("late", 120), ("soon", 30), ("middle", 60)):
                asking.append(asyncio.create_task(ask(name, 300, 4, within_s)))
                await asyncio.sleep(0.1)
            assert not ended, "the first ended before the others were there"
            await asyncio.gather(*asking)
    finally:
        await router.stop()
    return ended
