"""A prefill server of two ranks and a decode server of one, and the reverse: each rank's heads go between the
others'.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from prfaas_testbed.instances.sglang_client import generate, prompt_of

pytestmark = pytest.mark.skipif(
    not os.environ.get("PRFAAS_LONG_TESTS"), reason="servers of two ranks, minutes: set PRFAAS_LONG_TESTS=1"
)

K_OUTPUT_TOKENS = 16
K_LENGTHS = (20, 700, 5000)
K_LOGPROB_BOUND = 0.001
K_FULL_PRECISION = ("--dtype", "float32")
"""Two ranks add up in another order: in bfloat16 that can change a token."""
K_TWO_RANKS = (*K_FULL_PRECISION, "--tp-size", "2")
K_A_CORE_EACH = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.mark.parametrize("two", ["prefill", "decode"])
@pytest.mark.parametrize("overlap", ["chunk", "layer"])
def test_tokens_and_logprobs_equal_a_plain_servers_whichever_side_has_two_ranks(
    start_own: Any, tmp_path_factory: pytest.TempPathFactory, two: str, overlap: str
) -> None:
    one = "decode" if two == "prefill" else "prefill"
    servers = start_own.start(
        "dense",
        tmp_path_factory.mktemp(f"{two}-of-two"),
        **{
            "plain_args": K_FULL_PRECISION,
            f"{one}_args": K_FULL_PRECISION,
            f"{two}_args": K_TWO_RANKS,
            f"{two}_env": K_A_CORE_EACH,
            # Digests are of what one rank has.
            "config": {"verify": None, "overlap": overlap},
        },
    )
    try:
        for length in K_LENGTHS:
            prompt = prompt_of(length, length)
            wanted = generate(servers.plain.url, prompt, K_OUTPUT_TOKENS)
            _, answer = servers.pair.generate(prompt, K_OUTPUT_TOKENS)
            assert answer.error is None
            assert answer.tokens == wanted.tokens
            worst = max(abs(a - b) for a, b in zip(answer.logprobs, wanted.logprobs, strict=True))
            assert worst <= K_LOGPROB_BOUND
    finally:
        start_own.stop(servers)
