"""Which bytes slices are, and what is held against what."""

from __future__ import annotations

import pytest

from prfaas_testbed.bench import slices


@pytest.mark.parametrize("way", [*slices.K_WAYS, "whole"])
def test_as_many_bytes_are_moved_each_way_and_none_twice(way: str) -> None:
    here, there = slices.offsets(way, 128)
    assert len(here) * 128 == len(there) * 128 == slices.K_TRANSFER_BYTES
    assert len(set(here)) == len(set(there)) == len(here)
    assert max(*here, *there) + 128 <= slices.K_RANKS * slices.K_TRANSFER_BYTES


def test_only_one_end_lies_between_others() -> None:
    apart, close = [0, 128], [0, 64]
    assert [offsets[:2] for offsets in slices.offsets("scattered", 64)] == [close, apart]
    assert [offsets[:2] for offsets in slices.offsets("gathered", 64)] == [apart, close]


def test_slices_may_cost_twice_what_the_same_bytes_whole_do() -> None:
    def row(size: int, way: str, *cpu: float) -> dict[str, object]:
        return {"slice_bytes": size, "way": way, "cpu_s_per_gb": list(cpu), "seconds_per_gb": [1.0]}

    rows = [
        row(slices.K_WHOLE_BYTES, "whole", 1.0, 9.0, 1.0), row(64, "scattered", 2.0), row(64, "gathered", 2.1)
    ]  # fmt: skip
    assert [(r["name"], r["outcome"], r["value"]) for r in slices.judge(rows)] == [
        ("slices/64/scattered/cpu_to_whole", "passed", 2.0),
        ("slices/64/gathered/cpu_to_whole", "failed", 2.1),
    ]
