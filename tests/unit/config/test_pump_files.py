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


@pytest.mark.parametrize("listen", ["0.0.0.0:7700", "[::]:7700"])
def test_a_pump_that_listens_everywhere_says_where_peers_dial_it(tmp_path: Path, listen: str) -> None:
    """What it advertises goes to the other site, where 0.0.0.0 is the other site."""
    path = tmp_path / "west.yaml"
    path.write_text(f"site: west\nlisten: '{listen}'\n")
    with pytest.raises(ConfigError, match="peers dial one: say which by `advertise: HOST:PORT`"):
        load_pump_config(path)
    path.write_text(f"site: west\nlisten: '{listen}'\nadvertise: 198.51.100.7\n")
    assert load_pump_config(path).advertise == "198.51.100.7"


K_LINK = "{peer_site: east, admission: {nominal_bps: 1000000000}}"


@pytest.mark.parametrize(
    ("line", "field", "allowed"),
    [
        ("listen: 'é.example:1'", "listen", "in ASCII"),
        ("listen: 'a..b:1'", "listen", "in ASCII"),
        (f"exposes: ['{'h' * 70}:1']", "exposes.0", "in ASCII"),
        ("metrics: nowhere", "metrics", "is not host:port"),
        ("advertise: 'a:b'", "advertise", "is not host:port"),
        ("advertise: 'a b'", "advertise", "expected a host's name"),
        (f"links: [{K_LINK}, {K_LINK}]", "the file", "links: two of them lead to east"),
        ("protocol_versions: [2, 1]", "the file", "the oldest, 2, is above the newest, 1"),
        ("staging_bytes: 99999999999999999", "staging_bytes", "less than or equal"),
        ('control_socket: "a\\0b"', "line 2, column 17", "expected text without one"),
    ],
)
def test_what_a_pump_would_stumble_over_is_the_files_fault(
    tmp_path: Path, line: str, field: str, allowed: str
) -> None:
    path = tmp_path / "west.yaml"
    path.write_text(f"site: west\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_pump_config(path)
    assert str(caught.value).startswith(f"{path}: {field}: ")
    assert allowed in str(caught.value)
    assert "\n" not in str(caught.value)
