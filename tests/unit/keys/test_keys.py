"""Site authorities and certificates: files, rotation, and what TLS makes of them (over memory, without
sockets).
"""

from __future__ import annotations

import datetime
import shutil
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from prfaas.cli.main import main
from prfaas.config.router import Tls
from prfaas.model.errors import ConfigError, UsageError
from prfaas.pump import keys
from prfaas.router.tls import tls_context

NOW = datetime.datetime.now(datetime.UTC)


def make_site(folder: Path, site: str, days: float = 30, now: datetime.datetime = NOW) -> Path:
    keys.create_site(folder, site, days=days, authority_days=3650, now=now)
    return folder


@pytest.fixture
def east(tmp_path: Path) -> Path:
    return make_site(tmp_path / "east", "east")


@pytest.fixture
def west(tmp_path: Path) -> Path:
    return make_site(tmp_path / "west", "west")


def handshake(
    client: ssl.SSLContext, server: ssl.SSLContext, site: str
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends after a handshake through memory. Raises what either end raises."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    dialler = client.wrap_bio(to_client, to_server, server_hostname=keys.site_dns_name(site))
    listener = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(8):
        for end in (dialler, listener):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
    listener.write(b"x")  # under TLS 1.3 a dialler learns of a refused certificate only when it reads
    assert dialler.read(1) == b"x"
    return dialler, listener


def contexts(
    dials: Path, listens: Path, dial_trusts: Path, listen_trusts: Path
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return (
        keys.tls_context(
            server=False, site_file=dials / "site.pem", authorities=[dial_trusts / "authority.crt"]
        ),
        keys.tls_context(
            server=True, site_file=listens / "site.pem", authorities=[listen_trusts / "authority.crt"]
        ),
    )


def test_two_sites_prove_their_names_to_each_other_over_tls_1_3(east: Path, west: Path) -> None:
    dialler, listener = handshake(*contexts(east, west, west, east), "west")
    assert dialler.version() == "TLSv1.3"
    assert keys.peer_site(listener) == "east"
    assert keys.peer_site(dialler) == "west"


def test_a_dialler_refuses_a_listener_of_another_site(east: Path, west: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(*contexts(east, west, west, east), "north")


def test_a_listener_refuses_a_site_whose_authority_it_does_not_trust(
    east: Path, west: Path, tmp_path: Path
) -> None:
    stranger = make_site(tmp_path / "stranger", "east")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(*contexts(stranger, west, west, east), "west")


def test_a_listener_refuses_a_dialler_without_a_certificate(east: Path, west: Path) -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(west / "authority.crt")
    _, server = contexts(east, west, west, east)
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate"):
        handshake(bare, server, "west")


def test_an_expired_certificate_is_refused(west: Path, tmp_path: Path) -> None:
    late = make_site(tmp_path / "late", "east", days=1, now=NOW - datetime.timedelta(days=3))
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(*contexts(late, west, west, late), "west")


def test_plain_tls_1_2_is_refused(east: Path, west: Path) -> None:
    client, server = contexts(east, west, west, east)
    client.minimum_version = ssl.TLSVersion.TLSv1_2
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        handshake(client, server, "west")


def test_an_authority_cannot_vouch_for_another_site(east: Path, west: Path, tmp_path: Path) -> None:
    """The name constraint holds: west's authority signs a certificate that says east; nobody believes it."""
    forged = tmp_path / "forged"
    shutil.copytree(west, forged)
    authority = keys._load_certificate(forged / "authority.crt")
    authority_key = keys._load_key(forged / "authority.key")
    (forged / "site.pem").write_bytes(keys._site_pem("east", authority_key, authority, 10, NOW))
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree"):
        handshake(*contexts(forged, east, east, west), "east")


def test_private_keys_are_for_the_owner_only_and_the_authority_is_public(east: Path) -> None:
    assert {
        name: (east / name).stat().st_mode & 0o777 for name in ("site.pem", "authority.key", "authority.crt")
    } == {
        "site.pem": 0o600,
        "authority.key": 0o600,
        "authority.crt": 0o644,
    }


def test_creating_again_overwrites_nothing(east: Path) -> None:
    before = {path.name: path.read_bytes() for path in east.iterdir()}
    with pytest.raises(
        UsageError, match=r"holds authority.crt, authority.key, site.pem already.*keys rotate"
    ):
        make_site(east, "east")
    assert {path.name: path.read_bytes() for path in east.iterdir()} == before


def test_rotation_keeps_the_authority_so_peers_need_no_change(east: Path, west: Path) -> None:
    authority, old = (east / "authority.crt").read_bytes(), keys.read_identity(east / "site.pem")
    keys.rotate_site(east, days=20, now=NOW)
    new = keys.read_identity(east / "site.pem")
    assert (east / "authority.crt").read_bytes() == authority
    assert new.serial != old.serial
    assert (east / "site.pem").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in east.iterdir()) == ["authority.crt", "authority.key", "site.pem"]
    handshake(*contexts(east, west, west, east), "west")


def test_rotation_works_with_the_authority_kept_elsewhere(east: Path, tmp_path: Path) -> None:
    offline = tmp_path / "offline"
    offline.mkdir()
    for name in ("authority.key", "authority.crt"):
        shutil.move(east / name, offline / name)
    with pytest.raises(UsageError, match=r"authority.crt: no such file"):
        keys.rotate_site(east, days=20, now=NOW)
    keys.rotate_site(east, days=20, now=NOW, authority_folder=offline)
    certificate = x509.load_pem_x509_certificate((east / "site.pem").read_bytes())
    authority = x509.load_pem_x509_certificate((offline / "authority.crt").read_bytes())
    certificate.verify_directly_issued_by(authority)


def test_a_certificate_never_outlives_its_authority(tmp_path: Path, east: Path) -> None:
    with pytest.raises(UsageError, match="can't outlive its authority"):
        keys.create_site(tmp_path / "new", "north", days=30, authority_days=20, now=NOW)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match="can't outlive its authority"):
        keys.rotate_site(east, days=5000, now=NOW)


def test_rotation_refuses_a_key_of_another_authority(east: Path, west: Path) -> None:
    shutil.copy(west / "authority.key", east / "authority.key")
    with pytest.raises(UsageError, match="isn't the key of"):
        keys.rotate_site(east, days=20, now=NOW)


@pytest.mark.parametrize("site", ["", "East", "a.b", "-a", "a-", "a" * 64, "a/b", "a b"])
def test_a_site_name_that_cannot_stand_in_a_certificate_is_refused(site: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a site's name is"):
        make_site(tmp_path / "new", site)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("days", [0, -1, float("nan"), 1e6])
def test_an_impossible_lifetime_is_refused(days: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="days: found"):
        make_site(tmp_path / "new", "east", days=days)


def test_files_that_hold_something_else_are_named(east: Path, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    with pytest.raises(UsageError, match=r"garbage.pem: holds no PEM certificate"):
        keys.read_identity(garbage)
    with pytest.raises(UsageError, match=r"garbage.pem: no private key with its certificate: nothing in PEM"):
        keys.tls_context(server=True, site_file=garbage, authorities=[])
    with pytest.raises(UsageError, match=r"garbage.pem: not a certificate"):
        keys.tls_context(server=True, site_file=east / "site.pem", authorities=[garbage])
    with pytest.raises(UsageError, match=r"none.pem: no such file"):
        keys.tls_context(server=True, site_file=tmp_path / "none.pem", authorities=[])


def test_the_command_creates_rotates_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert main(["keys", "create", "--site", "east", "--out", str(folder), "--days", "7"]) == 0
    assert main(["keys", "rotate", "--out", str(folder), "--days", "14"]) == 0
    capsys.readouterr()
    assert main(["keys", "show", str(folder / "site.pem"), str(folder / "authority.crt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "site east, certificate" in lines[0]
    assert "14.0 days left" in lines[0]
    assert "site east, authority" in lines[1]
    assert main(["keys", "create", "--site", "east", "--out", str(folder)]) == 2
    assert "nothing was overwritten" in capsys.readouterr().err


def test_showing_tells_of_every_certificate_of_a_bundle_and_passes_over_no_file(
    tmp_path: Path, east: Path, west: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for site in (east, west):
        keys.trust(tmp_path, site / "authority.crt")
    files = (east / "authority.key", tmp_path / "trusted.crt", west / "site.pem")
    assert main(["keys", "show", *map(str, files)]) == 2
    said = capsys.readouterr()
    assert [line.partition(": ")[2].partition(", until")[0] for line in said.out.splitlines()] == [
        "site east, authority", "site west, authority", "site west, certificate",
    ]  # fmt: skip
    assert said.err == f"prfaas keys show: {east / 'authority.key'}: a private key and no certificate\n"


def test_showing_an_expired_certificate_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = make_site(tmp_path / "late", "east", days=1, now=NOW - datetime.timedelta(days=3))
    assert main(["keys", "show", str(late / "site.pem")]) == 1
    assert "expired 2.0 days ago" in capsys.readouterr().out


def test_the_site_file_holds_the_key_of_its_certificate(east: Path) -> None:
    content = (east / "site.pem").read_bytes()
    key = serialization.load_pem_private_key(content, password=None)
    certificate = keys._load_certificate(east / "site.pem")
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert key.public_key().public_bytes(*form) == certificate.public_key().public_bytes(*form)


def test_trust_collects_authorities_once_each(east: Path, west: Path, tmp_path: Path) -> None:
    north = make_site(tmp_path / "north", "north")
    for peer in (west, north, west):
        keys.trust(east, peer / "authority.crt")
    assert (east / "trusted.crt").read_text().count("BEGIN CERTIFICATE") == 2
    trusted = [east / "trusted.crt"]
    listener = keys.tls_context(server=True, site_file=east / "site.pem", authorities=trusted)
    for peer, name in ((west, "west"), (north, "north")):
        dialler = keys.tls_context(
            server=False, site_file=peer / "site.pem", authorities=[east / "authority.crt"]
        )
        assert keys.peer_site(handshake(dialler, listener, "east")[1]) == name


def test_trust_refuses_what_is_not_an_authority(east: Path, west: Path) -> None:
    with pytest.raises(UsageError, match=r"trust its authority\.crt"):
        keys.trust(east, west / "site.pem")
    assert not (east / "trusted.crt").exists()


def with_passphrase(site_pem: Path) -> Path:
    """The same file, its key encrypted."""
    text = site_pem.read_bytes()
    key = serialization.load_pem_private_key(text, password=None)
    cipher = serialization.BestAvailableEncryption(b"secret")
    locked = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, cipher)
    site_pem.write_bytes(locked + text[text.index(b"-----BEGIN CERTIFICATE") :])
    return site_pem


def test_a_key_with_a_passphrase_is_an_error_and_no_question_at_the_terminal(east: Path) -> None:
    """A pump or a router that asks waits for ever, or holds up all requests at a reload."""
    site_file = with_passphrase(east / "site.pem")
    with pytest.raises(UsageError, match=r"site\.pem: its private key has a passphrase"):
        keys.tls_context(server=True, site_file=site_file, authorities=[])
    with pytest.raises(ConfigError, match=r"listen\.tls\.key: found 'a passphrase'"):
        tls_context(Tls(certificate=str(site_file), key=str(site_file)))
