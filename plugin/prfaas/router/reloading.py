"""What a configuration needs besides its file: read whole, and found sound, before anything is changed."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from prfaas.config.profile import load_profile
from prfaas.config.router import CostFile, Model, RouterConfig
from prfaas.model.errors import ConfigError
from prfaas.router.fleet import keys_of
from prfaas.router.linear_cost import LinearCost
from prfaas.router.tls import page_authorities, tls_context
from prfaas.router.tokens import PromptReader
from prfaas.routing import CostProfile

K_FIXED = (
    ("limits", "max_header_bytes"),
    ("limits", "idle_timeout_s"),
    ("limits", "tokenise_threads"),
    ("logs", "events"),
    ("logs", "max_bytes"),
    ("seed", None),
)
"""What a running router keeps: a reload that changes it is refused."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One configuration's."""

    readers: Mapping[str, tuple[Model, PromptReader]]
    server_keys: Mapping[str, str]
    costs: Mapping[CostFile, CostProfile]
    authorities: Mapping[str, ssl.SSLContext]
    """Of links' pages, by the file that names them."""


def prepare(config: RouterConfig, former: Mapping[str, tuple[Model, PromptReader]]) -> Prepared:
    """Unchanged models keep their readers. Raises ConfigError or UsageError; changes nothing. Blocks."""
    if config.listen.tls is not None:
        tls_context(config.listen.tls)  # on one of its own: a key that doesn't fit spoils the context
    readers = {}
    for model in config.models:
        kept = former.get(model.name)
        readers[model.name] = kept if kept and kept[0] == model else (model, PromptReader(model))
    files = [cost for site in config.sites for cost in (site.cost, *site.costs.values())]
    return Prepared(
        readers=readers,
        server_keys=keys_of(config),
        costs={file: cost_profile(file) for file in files},
        authorities=page_authorities(config),
    )


def cost_profile(config: CostFile) -> CostProfile:
    """A site's costs. Raises UsageError or ConfigError."""
    return LinearCost(config) if config.profile is None else load_profile(config.profile)


def refuse_fixed(before: RouterConfig, after: RouterConfig) -> None:
    """Raises ConfigError for what can't be changed while running."""
    for section, field in K_FIXED:
        old, new = getattr(before, section), getattr(after, section)
        if field is not None:
            old, new = getattr(old, field), getattr(new, field)
        if old != new:
            _refuse(f"{section}.{field}" if field else section, new)
    old_tls, new_tls = before.listen.tls, after.listen.tls
    if (old_tls and old_tls.client_ca) != (new_tls and new_tls.client_ca):
        _refuse("listen.tls.client_ca", new_tls and new_tls.client_ca)
    kept = {"tls": old_tls} if old_tls and new_tls else {}
    if before.listen != after.listen.model_copy(update=kept):
        _refuse("listen", after.listen)


def _refuse(where: str, value: object) -> None:
    raise ConfigError("the configuration", where, value, "changing it needs a restart")
