"""A pump's configuration: from a file of its own, or from the one that its node's servers read."""

from __future__ import annotations

from pathlib import Path

import pytest

from prfaas.config.backend import load_pump_config
from prfaas.model.errors import ConfigError

K_PUMP = "site: west\nlisten: 127.0.0.1:7701\n"


@pytest.mark.parametrize(
    "text",
    [
        K_PUMP,
        "overlap: layer\npump: {site: west, listen: '127.0.0.1:7701'}\n",
        "overlap: layer\npump_file: pump.yaml\n",
    ],
    ids=["its own", "the servers'", "the servers' that names its own"],
)
def test_a_pump_is_read_from_its_own_file_and_from_the_servers(tmp_path: Path, text: str) -> None:
    (tmp_path / "pump.yaml").write_text(K_PUMP)
    path = tmp_path / "west.yaml"
    path.write_text(text)
    pump = load_pump_config(path)
    assert (pump.site, pump.listen) == ("west", "127.0.0.1:7701")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("site: west\nlisten: nowhere\n", "listen"),
        ("pump: {site: west, listen: nowhere}\n", "pump.listen"),
        ("listen: 127.0.0.1:1\n", "site"),
    ],
)
def test_a_fault_is_named_where_it_stands(tmp_path: Path, text: str, field: str) -> None:
    path = tmp_path / "west.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_pump_config(path)
    assert str(caught.value).startswith(f"{path}: {field}: ")
