"""Two real pumps with nothing but transfers between them."""

from __future__ import annotations

from prfaas_testbed.claim.memory import _alone
from prfaas_testbed.claim.pumps_alone import alone


def test_what_both_pumps_hold_is_looked_at_every_so_many_transfers() -> None:
    rows = alone(transfers=40, look_every=20)
    assert [row["transfers"] for row in rows] == [0, 20, 40]
    assert all(row[name] > 5 << 20 for row in rows for name in ("sender_bytes", "receiver_bytes"))
    assert "| 40 | " in _alone(rows)
