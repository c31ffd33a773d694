"""The door's own certificates, and whom a pump's page is believed from."""

from __future__ import annotations

import ssl

from prfaas.config.router import Link, RouterConfig, Tls
from prfaas.model.errors import ConfigError


def tls_context(tls: Tls) -> ssl.SSLContext:
    """Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificates(context, tls)
    return context


def load_certificates(context: ssl.SSLContext, tls: Tls) -> None:
    """Connections from now on use the files as they are now.

    Raises ConfigError; then the context may have half of them: try another one first.
    """

    def passphrase() -> str:
        # Without this OpenSSL would ask at the terminal, and all requests wait for the answer at a reload.
        raise ConfigError(tls.key, "listen.tls.key", "a passphrase", "expected a private key without one")

    try:
        context.load_cert_chain(tls.certificate, tls.key, passphrase)
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        found = error.reason or "no PEM"
        wanted = f"expected a PEM certificate, and in {tls.key} its private key"
        raise ConfigError(tls.certificate, "listen.tls", found, wanted) from None
    except OSError as error:
        names = f"{tls.key}, {tls.client_ca}" if tls.client_ca else tls.key
        wanted = f"expected files that can be read: this, {names}"
        raise ConfigError(tls.certificate, "listen.tls", error.strerror, wanted) from None


def page_authorities(config: RouterConfig) -> dict[str, ssl.SSLContext]:
    """By the file that a link's status_ca names. Raises ConfigError. Blocks."""
    return {link.status_ca: _authority(link) for link in config.links if link.status_ca is not None}


def _authority(link: Link) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=link.status_ca)
    except (OSError, ssl.SSLError) as error:
        where = f"link {link.source}>{link.target}: status_ca"
        raise ConfigError(
            "the configuration", where, link.status_ca, f"expected a PEM file: {error}"
        ) from None
