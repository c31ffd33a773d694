"""Keys for the sites of a bench, made once for each run."""

from __future__ import annotations

import datetime
from pathlib import Path

from prfaas.config.pump import TlsConfig
from prfaas.pump import keys
from prfaas_testbed.bench.places import K_SITES


def tls_for(folder: Path, site: str) -> TlsConfig:
    """`site`'s files under `folder`; the first call makes those of every site, each trusting all."""
    if not folder.exists():
        now = datetime.datetime.now(datetime.UTC)
        for name in K_SITES.values():
            keys.create_site(folder / name, name, days=1, authority_days=2, now=now)
        for name in K_SITES.values():
            for peer in K_SITES.values():
                keys.trust(folder / name, folder / peer / keys.K_AUTHORITY_CERTIFICATE)
    mine = folder / site
    return TlsConfig(site_file=mine / keys.K_SITE_FILE, authorities=(mine / keys.K_TRUSTED,))
