"""Real SGLang servers whose caches are in GPU memory: a plain one, and a prefill and a decode server through
the backend. Needs a GPU and SGLang's environment."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from prfaas_testbed.instances.models import K_MODELS
from prfaas_testbed.instances.sglang_client import Pair, generate, new_room, prompt_of
from prfaas_testbed.instances.sglang_server import K_CHECKOUT, K_SAME_CHUNKS, ServerSpec, SglangServer

pytestmark = pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no NVIDIA GPU on this machine")

K_HOST = "127.0.0.1"
K_OUTPUT_TOKENS = 16
K_LENGTHS = (20, 700, 5000)
K_LOGPROB_BOUND = 0.05
K_STAGING_BYTES = 8 << 20
"""Of prefill's chunks several fit, of the longest prompt one."""


def free_port() -> int:
    with socket.create_server((K_HOST, 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def started(model: str, folder: Path, overlap: str) -> Iterator[tuple[str, Pair]]:
    """A plain server's URL, and the pair."""
    config = folder / "prfaas.yaml"
    pump = {"site": "gpu", "control_socket": str(folder / "pump.sock"), "idle_exit_s": 20}
    config.write_text(yaml.safe_dump({"pump": pump, "overlap": overlap, "staging_bytes": K_STAGING_BYTES}))
    bootstrap_port = free_port()
    servers = {
        role: SglangServer(
            ServerSpec(
                role=role,  # type: ignore[arg-type]
                model=K_MODELS[model],
                model_dir=K_CHECKOUT / ".cache" / "models" / model,
                host=K_HOST,
                port=free_port(),
                bootstrap_port=bootstrap_port,
                config_path=config,
                device="cuda",
                extra_args=(*K_SAME_CHUNKS, "--chunked-prefill-size", "1024"),
            ),
            folder / f"{role}.log",
        )
        for role in ("plain", "prefill", "decode")
    }
    with contextlib.ExitStack() as stack:
        for server in servers.values():
            # One after the other: each looks at how much of the GPU's memory is free.
            stack.enter_context(server).wait_ready(timeout_s=300)
        prefill, decode = servers["prefill"], servers["decode"]
        yield servers["plain"].url, Pair(prefill.url, decode.url, K_HOST, bootstrap_port)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("model", "overlap"), [("dense", "layer"), ("dense", "chunk"), ("hybrid", "layer")])
def test_tokens_and_logprobs_equal_a_plain_servers(model: str, overlap: str, tmp_path: Path) -> None:
    with started(model, tmp_path, overlap) as (plain, pair):
        for length in K_LENGTHS:
            prompt = prompt_of(length, length)
            wanted = generate(plain, prompt, K_OUTPUT_TOKENS)
            _, answer = pair.generate(prompt, K_OUTPUT_TOKENS, new_room())
            assert answer.error is None
            assert answer.tokens == wanted.tokens
            worst = max(abs(a - b) for a, b in zip(answer.logprobs, wanted.logprobs, strict=True))
            assert worst <= K_LOGPROB_BOUND
