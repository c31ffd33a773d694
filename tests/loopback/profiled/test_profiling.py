"""A profile measured from a server whose profile is known: a profiled instance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prfaas_testbed.experiment.profiling import Prober, free_ports, profiled_instance, split_of

K_LENGTHS = (64, 1024)
K_OCCUPIED_S = (0.02, 0.14)
K_LATENCY_S = 0.1
K_STEP_S = 0.02
K_WITHIN_S = 0.06  # as wide as a busy machine needs: a latency taken for occupation would be outside


def known() -> dict[str, Any]:
    return {
        "name": "known", "description": "For a test.", "source": "made up", "gpus": 0,
        "tokens": list(K_LENGTHS), "prefill_s": [K_LATENCY_S + value for value in K_OCCUPIED_S],
        "latency_s": K_LATENCY_S, "kv_bytes_per_token": 64,
        "decode": {"step_s": K_STEP_S, "max_batch": 8}, "block_tokens": 1, "chunk_tokens": 4096,
    }  # fmt: skip


def test_a_known_profile_is_found_again_with_its_latency_apart(tmp_path: Path) -> None:
    with profiled_instance(known(), "toy", tmp_path, free_ports(1)[0]) as url:
        prober = Prober(url, seed=1)
        prober.ask([64], 2)
        look = prober.look(K_LENGTHS, (2,))
    occupied, latency_s = split_of(look)
    assert occupied == pytest.approx(K_OCCUPIED_S, abs=K_WITHIN_S)
    assert latency_s == pytest.approx(K_LATENCY_S, abs=K_WITHIN_S)
    assert look.step_s == pytest.approx([K_STEP_S], rel=0.9)
