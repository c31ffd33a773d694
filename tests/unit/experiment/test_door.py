"""What the router of a scaled experiment is told: rates and sizes as they are on the emulated link."""

from __future__ import annotations

from pathlib import Path

import pytest

from prfaas.config.profile import find_profile, load_profile
from prfaas_testbed.experiment.door import _scaled
from prfaas_testbed.experiment.machine import K_TOPOLOGIES


@pytest.mark.parametrize("name", ["1t-hybrid-h20", "kimi-linear-48b"])
def test_a_scaled_profile_s_file_says_what_the_instances_move(name: str, tmp_path: Path) -> None:
    found = load_profile(_scaled(name, 500, tmp_path))
    instances = find_profile(name, K_TOPOLOGIES).scaled(500)
    for tokens in (2000, 30_000, 131_072):
        assert found.kv_bytes(tokens) == pytest.approx(instances.kv_bytes(tokens), abs=1)
        assert found.prefill_s(tokens) == instances.prefill_s(tokens)
    assert found.state_bytes == instances.state_bytes


def test_an_unscaled_one_is_read_where_it_lies(tmp_path: Path) -> None:
    assert _scaled("toy", 1, tmp_path) == K_TOPOLOGIES / "profiles" / "toy.yaml"
    assert not list(tmp_path.iterdir())
