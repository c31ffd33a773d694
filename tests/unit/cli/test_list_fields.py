"""`prfaas-testbed list fields` is the schemas' own word, so that no page can be behind them."""

from __future__ import annotations

import pytest

from prfaas.config.fields import _models, field_lines
from prfaas_testbed.cli.list import K_FILES
from prfaas_testbed.cli.main import main


def test_every_field_of_every_file_stands_with_its_kind_its_default_and_its_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["list", "fields"]) == 0
    said = capsys.readouterr().out
    for line in (
        "  rate_mbps: number >= 0.05 <= 1000000 | null; default none\n      Of Ethernet frames. Null: as",
        "  from: text | null; default none",
        "Flap: Down `off_s`, then up `on_s`, so many times.\n  do: flap; needed",
        "  kind: cubic | bbr | udp; default cubic",
        "  arrivals: Poisson | Paced | Gamma | OnOff | Diurnal | AtOnce; needed",
        "  count: integer >= 1 <= 10000; default 1",
    ):
        assert line in said
    waiting, seen = list(K_FILES.values()), set()
    while waiting:
        model = waiting.pop()
        if model in seen:
            continue
        seen.add(model)
        assert f"\n{model.__name__}:" in said
        waiting += [one for field in model.model_fields.values() for one in _models(field.annotation)]
    assert len(seen) > 40


def test_a_schema_that_many_fields_have_is_told_once() -> None:
    lines = list(field_lines(K_FILES))
    assert sum(line.startswith("LinkChange:") for line in lines) == 1
