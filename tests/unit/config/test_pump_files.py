"""A pump's configuration: from a file of its own, or from the one that its node's servers read."""

from __future__ import annotations

from pathlib import Path

import pytest

from prfaas.config.backend import load_pump_config
from prfaas.config.pump import is_loopback
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


@pytest.mark.parametrize("where", ["pump: {pump}", "pump_file: pumps/pump.yaml", "{pump}"])
def test_paths_are_taken_from_the_folder_of_the_file_that_names_them(tmp_path: Path, where: str) -> None:
    """Not from where a pump is started, which for one that a server starts is /."""
    tls = "tls: {site_file: keys/site.pem, authorities: [keys/a.crt, /b.crt]}"
    pump = f"site: west\ncontrol_socket: p.sock\n{tls}\n"
    (tmp_path / "pumps").mkdir()
    (tmp_path / "pumps" / "pump.yaml").write_text(pump)
    path = tmp_path / "west.yaml"
    path.write_text(
        where.replace("{pump}", pump if where == "{pump}" else "{" + ", ".join(pump.split("\n")[:-1]) + "}")
    )
    folder = path.parent / "pumps" if "pump_file" in where else path.parent
    found = load_pump_config(path)
    assert found.control_socket == folder / "p.sock"
    assert found.tls is not None
    assert found.tls.site_file == folder / "keys" / "site.pem"
    assert found.tls.authorities == (folder / "keys" / "a.crt", Path("/b.crt"))


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


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.9.10", "::1", "localhost", "LOCALHOST", "::ffff:127.0.0.1"]
)
def test_loopback_is_told_by_the_whole_address(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "127.evil.example",
        "localhost.evil.example",
        "localhosts",
        "::1:2",
        "::1f",
        "10.0.0.1",
        "0.0.0.0",
        "::",
        "",
    ],
)
def test_what_only_begins_like_loopback_goes_without_tls_nowhere(host: str) -> None:
    """Plaintext is allowed on loopback alone, and a name of anybody's domain may begin with it."""
    assert not is_loopback(host)
