from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prfaas.config.loading import check
from prfaas.config.profile import ProfileConfig, find_profile
from prfaas.model.errors import ConfigError, UsageError
from prfaas.model.profiles import K_MIB

K_TOPOLOGIES = Path(__file__).parents[3] / "topologies"
K_GOOD: dict[str, Any] = {
    "name": "one",
    "description": "d",
    "source": "made up",
    "tokens": [1000, 2000],
    "prefill_s": [1, 3],
    "kv_bytes_per_token": 10,
    "state_bytes": 500,
    "decode": {"step_s": 0.02, "max_batch": 4},
}


@pytest.mark.parametrize("path", sorted((K_TOPOLOGIES / "profiles").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_profile_that_we_ship_loads_under_its_name(path: Path) -> None:
    assert find_profile(path.stem, K_TOPOLOGIES).name == path.stem


def test_shipped_profiles_hold_the_published_figures() -> None:
    h200 = find_profile("1t-hybrid-h200", K_TOPOLOGIES)
    assert h200.prefill_s(32768) == 1.84
    assert h200.kv_bytes(8192) == round(308.9 * K_MIB)
    kimi = find_profile("kimi-linear-48b", K_TOPOLOGIES)
    assert kimi.prefill_s(65536) == 0.748
    assert kimi.kv_bytes(131072) == 131072 * 8064
    h20 = find_profile("1t-hybrid-h20", K_TOPOLOGIES)
    assert h20.prefill_s(27000) == 4.265
    assert h20.prefill_s(10200) == 1.829
    assert h20.kv_bytes(20000) == pytest.approx(h200.kv_bytes(20000), rel=1e-6)


def test_sizes_per_token_grow_from_the_state() -> None:
    one = check(K_GOOD, ProfileConfig, "f.yaml").profile()
    assert one.kv_bytes(1500) == 500 + 15000
    assert one.transfer_bytes(1500, 1000) == 500 + 5000
    assert one.decode is not None
    assert one.decode.step_s() == 0.02


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        ({"prefill_s": [3, 1]}, "prefill_s", "falls from 3 at 1000 to 1 at 2000"),
        ({"prefill_s": [-1, 1]}, "prefill_s.0", "greater than 0"),
        ({"tokens": [2000, 1000]}, "tokens", "greater than the one before"),
        ({"tokens": [1000]}, "prefill_s", "2 values for 1 points"),
        ({"kv_bytes_per_token": None, "kv_mib": [2, 1]}, "kv_mib", "falls from 2"),
        ({"kv_bytes": [1, 2]}, "the file", "one of kv_mib, kv_bytes and kv_bytes_per_token"),
        ({"kv_bytes_per_token": None}, "the file", "needs kv_mib"),
        ({"kv_bytes_per_token": None, "kv_bytes": [100, 200]}, "the file", "state_bytes is more than"),
        ({"decode": {"step_s": [1, 2], "max_batch": 4}}, "decode", "batch sizes it was measured at"),
        ({"decode": {"step_s": 0.02, "max_batch": 0}}, "decode.max_batch", "greater than or equal to 1"),
        ({"kv_gib": 3}, "kv_gib", "unknown field, perhaps kv_mib; known here: "),
    ],
)
def test_a_profile_that_cannot_be_true_is_refused_by_field(
    change: dict[str, Any], field: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        check(K_GOOD | change, ProfileConfig, "f.yaml")
    assert caught.value.field == field


def test_an_unknown_profile_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown profile 'nope'; known: 1t-hybrid-h20, .*toy"):
        find_profile("nope", K_TOPOLOGIES)
    with pytest.raises(UsageError, match="none in"):
        find_profile("nope", tmp_path)


def test_a_profile_under_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    text = (K_TOPOLOGIES / "profiles" / "toy.yaml").read_text()
    (tmp_path / "profiles" / "other.yaml").write_text(text)
    with pytest.raises(ConfigError, match="the file's name says other"):
        find_profile("other", tmp_path)
