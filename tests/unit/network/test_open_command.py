"""Lines that change a link of an open network."""

from __future__ import annotations

import pytest

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


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("east->west", "a change names at least one of: delay_ms"),
        ("east->west loss=1", "unknown field, perhaps loss_percent"),
        ("east->west loss_percent=200", "less than or equal to 100"),
        ("east->west down", "expected FIELD=VALUE"),
        ("east->west rate_mbps=[", "no YAML"),
    ],
)
def test_a_line_that_says_no_change_is_told(line: str, says: str) -> None:
    with pytest.raises(UsageError, match=says.replace("(", r"\(")):
        read_change(line)


def test_an_unknown_network_is_told_before_anything_is_opened(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
