"""What processes hold over a load: growth is that of the settled half, told by the hour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prfaas.config.topology import load_topology
from prfaas_testbed.claim import memory, pieces, runs
from prfaas_testbed.claim.runs import K_TOPOLOGIES


def record(growth_mib: float, failed: int = 0) -> dict[str, Any]:
    """An hour of a process that fills 20 MiB in its first ten minutes, and then grows."""
    rows: list[dict[str, Any]] = []
    for at_s in range(0, 3601, 10):
        mib = 80 + 20 * min(1.0, at_s / 600) + growth_mib * at_s / 3600
        row = {"name": "router", "role": "router", "at_s": float(at_s), "rss_bytes": int(mib * 2**20)}
        rows.append({**row, "cpu_s": 0.02 * at_s, "repetition": 0})
        # An instance whose cache grows isn't judged.
        rows.append({**row, "name": "near", "rss_bytes": at_s << 20, "cpu_s": 0.0, "repetition": 0})
    rows.append({"name": "load", "repetition": 0, "at_s": 3600.0, "answered": 100 - failed, "failed": failed})
    return {"rows": rows, "repetitions": 6, "load_s": 600.0}


@pytest.mark.parametrize(("growth_mib", "reached"), [(0.0, True), (4.5, True), (6.0, False)])
def test_growth_is_that_of_the_settled_half(growth_mib: float, reached: bool, tmp_path: Path) -> None:
    data = record(growth_mib)
    _, one = memory.held(data)
    assert one.growth_mib == pytest.approx(growth_mib, abs=0.01)
    assert one.cores == pytest.approx(0.02)
    assert [goal.reached for goal in memory.goals(data)] == [reached, True]
    assert f"| router | 80.0 | {100 + growth_mib / 2:.1f} |" in memory.tell(data)
    assert "100 requests of 64 to 4,096 tokens in 60 minutes, 0.0 a second" in " ".join(
        memory.tell(data).split()
    )
    assert memory.draw(data, tmp_path) == ["memory.png"]


def test_what_pumps_alone_grow_by_is_told_beside_the_growth() -> None:
    data = record(12.0)
    assert memory.goals(data)[0].why == ""
    alone = [
        {"transfers": count, "at_s": 1.0, "sender_bytes": 0, "receiver_bytes": count << 10}
        for count in (0, 4096, 8192, 16384)
    ]
    # 100 transfers an hour, 1 KiB each.
    assert "grow by 0.1 MiB in an hour" in memory.goals({**data, "alone": alone})[0].why


def test_whether_caches_had_a_limit_is_told_by_the_record() -> None:
    assert "have no limit here" in memory.tell(record(1.0))
    assert "are full after a minute or two" in memory.tell({**record(1.0), "caches_bounded": True})


def test_the_files_caches_have_one() -> None:
    ((_, experiment),) = runs.parts(memory.K_EXPERIMENT)
    assert all(instance.limits.cache_tokens for instance in experiment.instances)


def test_a_request_that_failed_is_told() -> None:
    assert [goal.reached for goal in memory.goals(record(0.0, failed=1))] == [True, False]


def test_sites_on_loopback_have_addresses_of_their_own() -> None:
    here = memory.Here(load_topology("two-sites", K_TOPOLOGIES / "networks"))
    assert len({site.address for site in here.sites.values()}) == len(here.sites) == 2
    assert here.path("east", "west") == ["east->west"]


def test_it_is_not_among_the_simulated_pieces() -> None:
    assert "memory" in pieces.PIECES
    assert "memory" not in pieces.SIMULATED
