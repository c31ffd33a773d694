"""Lines that change a link of an open network."""

from __future__ import annotations

import pytest

from prfaas.config.topology import BurstyLoss
from prfaas.model.errors import UsageError
from prfaas_testbed.cli.main import main
from prfaas_testbed.cli.open import read_change


def test_a_line_is_a_link_and_its_new_fields_as_a_timeline_has_them() -> None:
    links, change = read_change("east->west loss_percent=1.5 rate_mbps=20\n")
    assert links == ["east->west"]
    assert change.model_dump(exclude_unset=True) == {"loss_percent": 1.5, "rate_mbps": 20}
    links, change = read_change("east<->west down=true")
    assert (links, change.down) == (["east->west", "west->east"], True)
    assert read_change("  \n")[0] == []
    _, change = read_change('east->west rate_mbps=null bursty_loss={"enter_percent":1,"leave_percent":25}')
    assert change.model_fields_set == {"rate_mbps", "bursty_loss"}
    assert change.rate_mbps is None
    assert change.bursty_loss == BurstyLoss(enter_percent=1, leave_percent=25)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("east->west", "a change names at least one of: delay_ms"),
        ("east->west loss=1", "unknown field, perhaps loss_percent"),
        ("east->west loss_percent=200", "less than or equal to 100"),
        ("east->west down", "expected FIELD=VALUE"),
        ("east->west rate_mbps=[", "rate_mbps: found '\\['; expected a number"),
        ("east->west rate_mbps=2026-13-45", "rate_mbps: found '2026-13-45'; expected a number"),
        ("east->west rate_mbps=" + "[" * 5000, "expected a number"),
        ("east->west rate_mbps=" + "9" * 5000, "rate_mbps: found '999"),
        ("east->west delay_ms=!!float", "expected a number"),
        ("east->west delay_ms=", "delay_ms: found ''; expected a number"),
        ("east->west delay_ms=5 delay_ms=6", "delay_ms is there a second time"),
    ],
)
def test_a_line_that_says_no_change_is_told(line: str, says: str) -> None:
    with pytest.raises(UsageError, match=says.replace("(", r"\(")):
        read_change(line)


def test_an_unknown_network_is_told_before_anything_is_opened(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
