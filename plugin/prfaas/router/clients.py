"""Who asks: API keys, what each may have at once, and which headers of a client count."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from prfaas.config.router import ApiKey, RouterConfig
from prfaas.router.errors import BadRequest, Overloaded

K_ANYONE = ApiKey(tenant="anyone", sha256="0" * 64, admin=True)
"""The client where no keys are configured."""
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a client may say of its request in headers."""

    slo_class: str
    first_token_within_s: float | None
    correlation: str | None
    """Its own x-request-id, handed back."""


class Clients:
    """Keys and counts. A reload keeps the counts of what is running."""

    def __init__(self, config: RouterConfig) -> None:
        self.in_flight = 0
        self._by_tenant: dict[str, int] = {}
        self.apply(config)

    def apply(self, config: RouterConfig) -> None:
        self._keys = {bytes.fromhex(key.sha256): key for key in config.keys}
        self._limits = config.limits
        self._classes = set(config.policy.classes)

    def identify(self, headers: Mapping[str, str]) -> ApiKey:
        """The key's client. Raises BadRequest with 401. (Digests are compared, so timing tells nothing.)"""
        if not self._keys:
            return K_ANYONE
        given = headers.get("Authorization", "")
        scheme, _, secret = given.partition(" ")
        if scheme.lower() != "bearer":
            secret = headers.get("x-api-key", "")
        found = self._keys.get(hashlib.sha256(secret.strip().encode("utf-8", "surrogateescape")).digest())
        if found is None:
            raise BadRequest(
                "Incorrect API key." if secret else "No API key was given.",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
            )
        return found

    def wishes(self, key: ApiKey, headers: Mapping[str, str]) -> Wishes:
        """Raises BadRequest for a class or time that can't be granted."""
        slo_class = headers.get("x-prfaas-class") or key.slo_class
        if slo_class and slo_class not in self._classes:
            raise BadRequest(
                f"x-prfaas-class: unknown; known: {', '.join(sorted(self._classes))}", code="unknown_class"
            )
        if slo_class and key.classes and slo_class not in (*key.classes, key.slo_class):
            raise BadRequest("x-prfaas-class: not granted to this key", status=403, kind="permission_error")
        within_s = None
        text = headers.get("x-prfaas-first-token-ms")
        if text is not None:
            try:
                within_s = float(text) / 1e3
            except ValueError:
                within_s = math.nan
            if not 0 < within_s < 86400:
                raise BadRequest("x-prfaas-first-token-ms: expected milliseconds above 0")
        correlation = headers.get("x-request-id")
        if correlation is not None and not _SANE_ID.fullmatch(correlation):
            correlation = None
        return Wishes(slo_class, within_s, correlation)

    @contextmanager
    def admitted(self, key: ApiKey) -> Iterator[None]:
        """One request's stay. Raises Overloaded when there are too many, of all or of this client."""
        mine = self._by_tenant.get(key.tenant, 0)
        if self.in_flight >= self._limits.max_in_flight:
            raise Overloaded(
                "The router is serving as many requests as it may.",
                retry_after_s=self._limits.retry_after_s,
            )
        if key.max_in_flight is not None and mine >= key.max_in_flight:
            raise Overloaded(
                f"This key has {mine} requests running, as many as it may.",
                code="rate_limit_exceeded",
                retry_after_s=self._limits.retry_after_s,
            )
        self.in_flight += 1
        self._by_tenant[key.tenant] = mine + 1
        try:
            yield
        finally:
            self.in_flight -= 1
            left = self._by_tenant[key.tenant] - 1
            if left:
                self._by_tenant[key.tenant] = left
            else:
                del self._by_tenant[key.tenant]
