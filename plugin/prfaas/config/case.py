"""Case files (topologies/cases/*.yaml), of three forms: one PrfaaS and one local cluster; several of each,
with `links:`; and a table of models' KV throughput, with `models:`. See topologies/cases/README.md."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from prfaas.config.lengths import (
    ConstantConfig,
    EmpiricalConfig,
    LengthsConfig,
    LognormalConfig,
    Tokens,
    UniformConfig,
    kind_of,
)
from prfaas.config.loading import Strict, check, not_a_mapping, read_yaml
from prfaas.config.profile import CurvesConfig, DecodeConfig

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
Instances = Annotated[int, Field(ge=0, le=1_000_000)]


class TraceLengths(Strict):
    """Lengths of a trace's prompts; with `reuse`, what a prefix cache leaves of them to prefill."""

    distribution: Literal["trace"]
    format: Literal["mooncake", "azure"]
    file: Annotated[str, Field(min_length=1)]
    """A file under topologies/traces, or a path."""
    reuse: Literal["none", "block", "exact"] = "none"
    """`block`: any whole-block prefix; `exact`: only where an earlier prompt ended, as state needs it."""
    cache_tokens: Annotated[int, Field(ge=0)] | None = None
    """Room of the cache; None: nothing is evicted."""
    max_tokens: Tokens | None = None
    """Longer prompts are cut here."""

    @model_validator(mode="after")
    def _prefixes_known(self) -> TraceLengths:
        if self.format == "azure" and self.reuse != "none":
            raise ValueError("an azure trace doesn't say which prefixes are shared: reuse must be none")
        return self


CaseLengths = Annotated[
    Annotated[Tokens, Tag("number")]
    | Annotated[LognormalConfig, Tag("truncated_lognormal")]
    | Annotated[UniformConfig, Tag("uniform")]
    | Annotated[ConstantConfig, Tag("constant")]
    | Annotated[EmpiricalConfig, Tag("empirical")]
    | Annotated[TraceLengths, Tag("trace")],
    Discriminator(
        kind_of,
        custom_error_type="lengths",
        custom_error_message="expected a number, or a mapping with distribution: truncated_lognormal, "
        "uniform, constant, empirical or trace",
    ),
]


class CaseWorkload(Strict):
    """The load."""

    input_tokens: CaseLengths
    """Uncached prompt tokens: what must be prefilled."""
    output_tokens: LengthsConfig
    """L_out; its mean counts."""


class PrfaasConfig(Strict):
    """The cluster that prefills long prompts for others."""

    instances: Instances
    """N_prfaas."""
    egress_gbps: NotNegative
    """B_out, 10⁹ bits a second."""
    profile: CurvesConfig
    """T_prefill and S_kv of one instance."""
    gpus: Annotated[int, Field(ge=1)] = 8
    """Of an instance."""
    rtt_ms: NotNegative = 0.0
    chunk_tokens: Tokens = 8192
    """Tokens of a prefill step; KV leaves after each."""

    @model_validator(mode="after")
    def _has_sizes(self) -> PrfaasConfig:
        if self.profile.kv_curve() is None:
            raise ValueError("profile needs kv_mib, kv_bytes or kv_bytes_per_token: its KV is what is sent")
        return self


class LocalConfig(Strict):
    """The cluster where requests arrive and decode."""

    instances: Annotated[int, Field(ge=2, le=1_000_000)]
    """N_p + N_d."""
    profile: CurvesConfig
    """T_prefill of one instance."""
    gpus: Annotated[int, Field(ge=1)] = 8


class PricesConfig(Strict):
    """What hardware and bytes cost."""

    prfaas_instance_hour: NotNegative
    local_instance_hour: NotNegative
    egress_per_gb: NotNegative = 0.0
    """Per 10⁹ bytes over the link."""
    currency: Annotated[str, Field(min_length=1, max_length=16)] = "USD"


K_MOST_RATE_RPS = 1e5
"""Sizing counts instances one by one: beyond this, for minutes."""


class SloConfig(Strict):
    """What is promised, for "how many instances"."""

    rate_rps: Annotated[float, Field(gt=0, le=K_MOST_RATE_RPS)]
    ttft_s: Positive
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.9
    decode_utilisation: Annotated[float, Field(gt=0, le=1)] = 0.9
    link_utilisation: Annotated[float, Field(gt=0, lt=1)] = 0.9


class Published(Strict):
    """What somebody printed for one system, beside which ours is shown. All optional."""

    threshold_tokens: Positive | None = None
    prefill: Instances | None = None
    decode: Instances | None = None
    offloaded: Annotated[float, Field(ge=0, le=1)] | None = None
    throughput_rps: Positive | None = None
    prfaas_rps: Positive | None = None
    local_prefill_rps: Positive | None = None
    decode_rps: Positive | None = None
    egress_gbps: NotNegative | None = None
    ttft_mean_s: Positive | None = None
    ttft_p90_s: Positive | None = None


class PublishedAll(Strict):
    prfaas_pd: Published = Published()
    homogeneous: Published = Published()
    naive: Published = Published()


class CaseConfig(Strict):
    """One PrfaaS cluster, one local cluster, a link."""

    description: str = ""
    workload: CaseWorkload
    decode: DecodeConfig
    """Of a local instance."""
    prfaas: PrfaasConfig
    local: LocalConfig
    homogeneous_instances: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    """Local instances that cost as much as both clusters together."""
    decode_slowdown: Annotated[float, Field(gt=1, le=1000)] = 2.0
    """How much slower a collocated engine may decode for its prefills."""
    prices: PricesConfig | None = None
    slo: SloConfig | None = None
    solved_back: tuple[str, ...] = ()
    """Fields whose values were not published but solved back from published results: comparing those results
    with ours says nothing."""
    published: PublishedAll | None = None

    @field_validator("solved_back")
    @classmethod
    def _fields_exist(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = ("prfaas.profile", "local.profile", "decode.step_s", "decode.max_batch", "workload")
        for name in value:
            if name not in known:
                raise ValueError(f"{name!r} is not one of {', '.join(known)}")
        return value


class SitesPrfaas(Strict):
    name: Name
    instances: Instances
    profile: CurvesConfig
    egress_gbps: NotNegative | None = None
    """Over all its links together; None: its links alone limit it."""

    @model_validator(mode="after")
    def _has_sizes(self) -> SitesPrfaas:
        if self.profile.kv_curve() is None:
            raise ValueError("profile needs kv_mib, kv_bytes or kv_bytes_per_token: its KV is what is sent")
        return self


class SitesLocal(Strict):
    name: Name
    instances: Annotated[int, Field(ge=1, le=1_000_000)]
    profile: CurvesConfig
    decode: DecodeConfig
    workload: CaseWorkload
    rate_share: Positive
    """Of all requests, relative to the other local clusters."""
    prefill: Instances | None = None
    """N_p, where roles are fixed."""

    @model_validator(mode="after")
    def _some_decode(self) -> SitesLocal:
        if self.prefill is not None and self.prefill >= self.instances:
            raise ValueError(f"prefill {self.prefill} leaves none of {self.instances} instances to decode")
        return self


class SitesLink(Strict):
    source: Name
    target: Name
    gbps: NotNegative


class SitesCaseConfig(Strict):
    """Several clusters of each kind."""

    description: str = ""
    prfaas: Annotated[tuple[SitesPrfaas, ...], Field(min_length=1)]
    local: Annotated[tuple[SitesLocal, ...], Field(min_length=1)]
    links: tuple[SitesLink, ...]

    @model_validator(mode="after")
    def _names_fit(self) -> SitesCaseConfig:
        names = [one.name for one in self.prfaas] + [one.name for one in self.local]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two clusters are named {twice[0]}")
        seen = set()
        for link in self.links:
            if link.source not in {one.name for one in self.prfaas}:
                raise ValueError(f"a link's source {link.source!r} is no PrfaaS cluster")
            if link.target not in {one.name for one in self.local}:
                raise ValueError(f"a link's target {link.target!r} is no local cluster")
            if (link.source, link.target) in seen:
                raise ValueError(f"two links lead from {link.source} to {link.target}")
            seen.add((link.source, link.target))
        return self


class TableModel(Strict):
    kind: Literal["hybrid", "dense"]
    layers: str = ""
    gbps: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Φ at each of the table's lengths, for one instance."""


class PublishedEgress(Strict):
    """What somebody derived from the table."""

    model: str
    gpus: Annotated[int, Field(ge=1)]
    tokens: Positive
    gbps: Positive
    below: bool = False
    """Printed as "under"."""


class TableCaseConfig(Strict):
    """Φ of several models."""

    description: str = ""
    tokens: Annotated[tuple[Positive, ...], Field(min_length=2)]
    models: Annotated[dict[str, TableModel], Field(min_length=1)]
    gpus_per_instance: Annotated[int, Field(ge=1)] = 8
    """P."""
    published_egress: tuple[PublishedEgress, ...] = ()

    @field_validator("tokens")
    @classmethod
    def _rises(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for before, after in pairwise(value):
            if after <= before:
                raise ValueError(f"{after:g} follows {before:g}; each must be greater than the one before")
        return value

    @model_validator(mode="after")
    def _fits(self) -> TableCaseConfig:
        for name, model in self.models.items():
            if len(model.gbps) != len(self.tokens):
                raise ValueError(
                    f"models.{name}.gbps has {len(model.gbps)} values for {len(self.tokens)} lengths"
                )
        for row in self.published_egress:
            if row.model not in self.models:
                raise ValueError(f"published_egress names {row.model!r}; known: {', '.join(self.models)}")
            if not self.tokens[0] <= row.tokens <= self.tokens[-1]:
                raise ValueError(f"published_egress: {row.tokens:g} tokens lie outside the table")
        return self


def load_case(path: Path | str) -> CaseConfig | SitesCaseConfig | TableCaseConfig:
    """A case file of any form. Raises UsageError, ConfigError."""
    data = read_yaml(path)
    if not isinstance(data, Mapping):
        raise not_a_mapping(data, str(path))
    if "models" in data:
        return check(data, TableCaseConfig, str(path))
    if "links" in data:
        return check(data, SitesCaseConfig, str(path))
    return check(data, CaseConfig, str(path))
