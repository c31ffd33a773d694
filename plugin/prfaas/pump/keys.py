"""Authorities and certificates of sites, and the TLS contexts that hold peers to them.

Every site has its own authority, so no site has to trust another with its name: the authority's certificate
carries a critical name constraint (RFC 5280, 4.2.1.10) that lets it vouch for one site only, and OpenSSL
refuses a chain that breaks it. A certificate names its site as the DNS name SITE.site.prfaas; a dialler asks
TLS for that name, a listener reads it from the verified certificate by `peer_site`. Both sides show one, and
TLS 1.3 is the least version.

A site's folder, as `create_site` makes it:
  authority.crt   public: what peers put under their `authorities`
  authority.key   mode 0600; needed only to sign, so it can be kept elsewhere
  trusted.crt     authorities of the sites that may connect here, one after the other: `trust` adds to it
  site.pem        mode 0600: private key and certificate in one file, so that a rotation is one rename
"""

from __future__ import annotations

import datetime
import os
import re
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from prfaas.model.errors import UsageError

K_SITE_SUFFIX = ".site.prfaas"
K_SITE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
K_BACKDATED = datetime.timedelta(minutes=5)  # clocks of two sites may differ by this much
K_AUTHORITY_CERTIFICATE, K_AUTHORITY_KEY = "authority.crt", "authority.key"
K_SITE_FILE, K_TRUSTED = "site.pem", "trusted.crt"


@dataclass(frozen=True)
class Identity:
    """What a certificate file says."""

    site: str
    kind: str
    """`authority` or `certificate`."""
    not_before: datetime.datetime
    not_after: datetime.datetime
    serial: int
    fingerprint_sha256: str

    def days_left(self, now: datetime.datetime) -> float:
        return (self.not_after - now).total_seconds() / 86400


def create_site(
    folder: Path, site: str, *, days: float, authority_days: float, now: datetime.datetime
) -> None:
    """Make a site's authority and its first certificate in `folder` (created, mode 0700).

    Raises UsageError, with nothing written, for a bad name or lifetime and where one of the files exists.
    """
    check_site_name(site)
    _check_days("days", days)
    _check_days("authority days", authority_days)
    if days > authority_days:
        raise UsageError(
            f"a certificate can't outlive its authority: {days:g} days asked of {authority_days:g}"
        )
    present = [
        name for name in (K_AUTHORITY_CERTIFICATE, K_AUTHORITY_KEY, K_SITE_FILE) if (folder / name).exists()
    ]
    if present:
        raise UsageError(
            f"{folder}: holds {', '.join(present)} already; nothing was overwritten. "
            "`prfaas keys rotate` makes a new certificate under the same authority; "
            "a new authority needs a new folder"
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: can't be made: {error.strerror}") from None
    key = ec.generate_private_key(ec.SECP256R1())
    authority = _authority_certificate(site, key, authority_days, now)
    _write_new(folder / K_AUTHORITY_KEY, _pem_of_key(key), 0o600)
    _write_new(folder / K_AUTHORITY_CERTIFICATE, authority.public_bytes(serialization.Encoding.PEM), 0o644)
    _write_new(folder / K_SITE_FILE, _site_pem(site, key, authority, days, now), 0o600)


def rotate_site(
    folder: Path, *, days: float, now: datetime.datetime, authority_folder: Path | None = None
) -> None:
    """Replace `folder`/site.pem by a new key and certificate under the same authority, in one rename.

    Peers trust the authority, so nothing changes for them; connections that stand keep the old certificate.
    Raises UsageError for a bad lifetime, a missing or unreadable authority, or one that ends before the
    certificate.
    """
    _check_days("days", days)
    where = authority_folder or folder
    authority = _load_certificate(where / K_AUTHORITY_CERTIFICATE)
    key = _load_key(where / K_AUTHORITY_KEY)
    if _public_bytes(key.public_key()) != _public_bytes(authority.public_key()):
        raise UsageError(f"{where}: {K_AUTHORITY_KEY} isn't the key of {K_AUTHORITY_CERTIFICATE}")
    site = identity_of(authority, where / K_AUTHORITY_CERTIFICATE).site
    if now + datetime.timedelta(days=days) > authority.not_valid_after_utc:
        raise UsageError(
            f"a certificate can't outlive its authority: {days:g} days asked, "
            f"{where / K_AUTHORITY_CERTIFICATE} ends {authority.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        )
    fresh = folder / f".{K_SITE_FILE}.{os.getpid()}"
    _write_new(fresh, _site_pem(site, key, authority, days, now), 0o600)
    os.replace(fresh, folder / K_SITE_FILE)


def trust(folder: Path, authority: Path) -> Identity:
    """Add a peer's authority to `folder`/trusted.crt, once however often it is asked.

    Raises UsageError for a file that isn't an authority of ours.
    """
    certificate = _load_certificate(authority)
    identity = identity_of(certificate, authority)
    if identity.kind != "authority":
        raise UsageError(f"{authority}: this is a site's certificate; trust its authority.crt")
    trusted = folder / K_TRUSTED
    text = certificate.public_bytes(serialization.Encoding.PEM)
    known = _read(trusted) if trusted.exists() else b""
    if text not in known:
        fresh = folder / f".{K_TRUSTED}.{os.getpid()}"
        _write_new(fresh, known + text, 0o644)
        os.replace(fresh, trusted)
    return identity


def read_identity(path: Path) -> Identity:
    """What the (first) certificate in `path` says. Raises UsageError for a file that is missing or isn't
    ours.
    """
    return identity_of(_load_certificate(path), path)


def read_identities(path: Path) -> list[Identity]:
    """What each certificate in `path` says: trusted.crt holds one for each site. Raises UsageError for a file
    that is missing or holds none, or one that isn't ours.
    """
    content = _read(path)
    try:
        return [identity_of(one, path) for one in x509.load_pem_x509_certificates(content)]
    except ValueError:
        if b"PRIVATE KEY-----" in content:
            raise UsageError(f"{path}: a private key and no certificate") from None
        raise UsageError(f"{path}: holds no PEM certificate") from None


def identity_of(certificate: x509.Certificate, origin: object) -> Identity:
    """Site and lifetime of a certificate made here. Raises UsageError for one that names no site."""
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.NameConstraints).value
        names = [
            name.value for name in constraints.permitted_subtrees or [] if isinstance(name, x509.DNSName)
        ]
        kind = "authority"
    except x509.ExtensionNotFound:
        try:
            alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            raise UsageError(
                f"{origin}: this certificate names no site; `prfaas keys create` makes one"
            ) from None
        names = alternative.get_values_for_type(x509.DNSName)
        kind = "certificate"
    site = site_in_names(names)
    if site is None:
        raise UsageError(f"{origin}: this certificate names no site; `prfaas keys create` makes one")
    return Identity(
        site=site,
        kind=kind,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        serial=certificate.serial_number,
        fingerprint_sha256=certificate.fingerprint(hashes.SHA256()).hex(),
    )


def is_open_to_others(site_file: Path) -> bool:
    """Whether anybody but its owner may read the private key in it."""
    return bool(site_file.stat().st_mode & 0o077)


def site_dns_name(site: str) -> str:
    """The name a certificate of `site` carries, and that a dialler asks TLS for (`server_hostname`)."""
    return site + K_SITE_SUFFIX


def site_in_names(names: Iterable[str]) -> str | None:
    """The one site among DNS names; None where there is none, or more than one."""
    sites = {
        name[: -len(K_SITE_SUFFIX)]
        for name in names
        if name.endswith(K_SITE_SUFFIX) and K_SITE_NAME.fullmatch(name[: -len(K_SITE_SUFFIX)])
    }
    return sites.pop() if len(sites) == 1 else None


def peer_site(connection: ssl.SSLObject | ssl.SSLSocket) -> str | None:
    """The site that the peer proved to be, after the handshake; None without a verified certificate."""
    certificate = connection.getpeercert()
    if not certificate:
        return None
    names = [str(entry[1]) for entry in certificate.get("subjectAltName", ()) if entry[0] == "DNS"]
    return site_in_names(names)


def tls_context(*, server: bool, site_file: Path, authorities: Iterable[Path]) -> ssl.SSLContext:
    """A context for one end of mutual TLS 1.3 that shows `site_file` and trusts `authorities`.

    A dialler passes `server_hostname=site_dns_name(peer's site)` to the handshake: TLS then refuses another
    site. A listener reads `peer_site` after it. Raises UsageError for files that can't be loaded.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED

    def passphrase() -> str:
        # Without this OpenSSL would ask at the terminal, and wait there.
        raise UsageError(f"{site_file}: its private key has a passphrase, which nobody is asked for here")

    # Partial chains are off by default; a purpose check on the peer's certificate comes with CERT_REQUIRED.
    try:
        context.load_cert_chain(site_file, site_file, passphrase)
    except FileNotFoundError:
        raise UsageError(f"{site_file}: no such file; `prfaas keys create` makes it") from None
    except (ssl.SSLError, OSError) as error:
        raise UsageError(f"{site_file}: no private key with its certificate: {_reason(error)}") from None
    for authority in authorities:
        try:
            context.load_verify_locations(authority)
        except FileNotFoundError:
            raise UsageError(f"{authority}: no such file; the peer's authority.crt belongs here") from None
        except (ssl.SSLError, OSError) as error:
            raise UsageError(f"{authority}: not a certificate: {_reason(error)}") from None
    return context


def check_site_name(site: str) -> None:
    """Raises UsageError unless `site` can stand in a certificate: a DNS label."""
    if not K_SITE_NAME.fullmatch(site):
        raise UsageError(
            f"site {site!r}: a site's name is 1 to 63 of a-z, 0-9 and '-', with no '-' at either end"
        )


def _check_days(what: str, days: float) -> None:
    if not 0 < days <= 36500:
        raise UsageError(f"{what}: found {days:g}; more than 0 and at most 36500 are allowed")


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "nothing in PEM"
    return error.strerror or str(error)


def _authority_certificate(
    site: str, key: ec.EllipticCurvePrivateKey, days: float, now: datetime.datetime
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"prfaas authority of {site}")])
    subtree = x509.DNSName(site_dns_name(site))
    usage = _key_usage(digital_signature=False, signs_certificates=True)
    return (
        _builder(name, name, key.public_key(), days, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.NameConstraints([subtree], None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _site_pem(
    site: str,
    authority_key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    days: float,
    now: datetime.datetime,
) -> bytes:
    """A new private key and its certificate, PEM, one after the other."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site_dns_name(site))])
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(name, authority.subject, key.public_key(), days, now)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(site_dns_name(site))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True, signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    return _pem_of_key(key) + certificate.public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float, now: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - K_BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _key_usage(*, digital_signature: bool, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _public_bytes(key: object) -> bytes:
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that must not exist, with `mode` from its first moment."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise UsageError(f"{path}: exists already; nothing was overwritten") from None
    except OSError as error:
        raise UsageError(f"{path}: can't be written: {error.strerror}") from None
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror}") from None


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError:
        raise UsageError(f"{path}: holds no PEM certificate") from None


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError):
        raise UsageError(f"{path}: holds no PEM private key without a passphrase") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UsageError(
            f"{path}: holds a {type(key).__name__}; `prfaas keys create` makes elliptic-curve keys"
        )
    return key
