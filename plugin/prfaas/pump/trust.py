"""Who may talk to this pump: mutual TLS contexts, read again when their files change, and the site a peer has
proved.

A new certificate (prfaas keys rotate) serves the next connection; those that stand go on, so a rotation drops
nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from prfaas.config.pump import PumpConfig, is_loopback
from prfaas.model.errors import RemoteProtocolError, UsageError
from prfaas.pump import openssl
from prfaas.pump.keys import read_identities, site_in_names
from prfaas.pump.tls import TlsContext

log = logging.getLogger(__name__)

K_WARNED_MOST = 1024
"""Hosts whose plaintext was warned of, each once; any host may come."""


class Trust:
    """The configuration's word on encryption and on sites. Raises UsageError at once for files that can't be
    used.
    """

    def __init__(self, config: PumpConfig) -> None:
        self._config = config
        self._contexts: dict[bool, tuple[tuple[object, ...], TlsContext]] = {}
        self._warned: set[str] = set()
        self.ends_unix_s: dict[tuple[str, str, str], float] = {}
        """When certificates end, by file, site and kind; of several alike the last, which does for all."""
        if config.tls is not None:
            self._load(server=True)
            self._load(server=False)
            log.info("mutual TLS 1.3 by %s", openssl.version())

    @property
    def encrypted(self) -> bool:
        return self._config.tls is not None

    def context(self, *, server: bool) -> TlsContext | None:
        """For the next connection; None without TLS. Bad files leave the last good ones in
        force.
        """
        if self._config.tls is None:
            return None
        held = self._contexts[server]
        if held[0] != self._marks():
            try:
                self._load(server=server)
                log.info("new certificates are in force")
            except UsageError as error:
                log.error("the certificates before stay in force: %s", error)
                self._contexts[server] = (self._marks(), held[1])
        return self._contexts[server][1]

    def _load(self, *, server: bool) -> None:
        tls = self._config.tls
        assert tls is not None
        marks = self._marks()
        context = TlsContext(server=server, site_file=tls.site_file, authorities=tls.authorities)
        self.ends_unix_s = _ends((tls.site_file, *tls.authorities))
        self._contexts[server] = (marks, context)

    def _marks(self) -> tuple[object, ...]:
        tls = self._config.tls
        assert tls is not None
        return tuple(_mark(path) for path in (tls.site_file, *tls.authorities))

    def plaintext_allowed(self, host: str) -> bool:
        """Whether traffic with `host` may go without TLS; said once in the log where it isn't loopback."""
        if is_loopback(host):
            return True
        if self._config.allow_plaintext and host not in self._warned and len(self._warned) < K_WARNED_MOST:
            self._warned.add(host)
            log.warning("allow_plaintext: traffic with %s is neither encrypted nor authenticated", host)
        return self._config.allow_plaintext

    def check_certificate(self, certificate: Mapping[str, object] | None, wanted_site: str) -> str:
        """The site that a checked certificate proves; "" without TLS. Raises RemoteProtocolError for one that
        isn't welcome, or isn't `wanted_site` where that is named.
        """
        tls = self._config.tls
        if tls is None:
            return ""
        names = (certificate or {}).get("subjectAltName", ())
        assert isinstance(names, tuple)
        site = site_in_names([str(entry[1]) for entry in names if entry[0] == "DNS"])
        if site is None:
            raise RemoteProtocolError("a certificate that names no site")
        if wanted_site and site != wanted_site:
            raise RemoteProtocolError(f"site {site!r} answers where {wanted_site!r} was expected")
        if tls.sites and site not in tls.sites:
            raise RemoteProtocolError(f"site {site!r} is not among those that may connect")
        return site


def _ends(files: Iterable[Path]) -> dict[tuple[str, str, str], float]:
    found: dict[tuple[str, str, str], float] = {}
    for file in files:
        # An authority of somebody else's making may vouch for our names and say nothing of them itself.
        with contextlib.suppress(UsageError):
            for identity in read_identities(file):
                name = (str(file), identity.site, identity.kind)
                found[name] = max(found.get(name, 0.0), identity.not_after.timestamp())
    return found


def _mark(path: Path) -> object:
    """Changes when the file does."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_ino, stat.st_size)
