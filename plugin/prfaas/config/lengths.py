"""Distributions of token counts as files write them: a number, or a mapping with `distribution:`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from prfaas.config.loading import Strict
from prfaas.model.lengths import Constant, Empirical, Lengths, TruncatedLognormal, Uniform

Tokens = Annotated[int, Field(ge=1, le=100_000_000)]


class LognormalConfig(Strict):
    """ln L ~ N(mu, sigma²) between min and max, renormalised (not clipped)."""

    distribution: Literal["truncated_lognormal"]
    mu: Annotated[float, Field(ge=-50, le=50)]
    sigma: Annotated[float, Field(gt=0, le=20)]
    min: Tokens
    max: Tokens

    @model_validator(mode="after")
    def _some_mass(self) -> LognormalConfig:
        if self.max <= self.min:
            raise ValueError(f"max must be above min, {self.min}")
        if not self.lengths().kept > 1e-9:
            raise ValueError(f"no length between min {self.min} and max {self.max} is at all likely")
        return self

    def lengths(self) -> TruncatedLognormal:
        return TruncatedLognormal(self.mu, self.sigma, self.min, self.max)


class UniformConfig(Strict):
    """Every length between min and max alike."""

    distribution: Literal["uniform"]
    min: Tokens
    max: Tokens

    @model_validator(mode="after")
    def _in_order(self) -> UniformConfig:
        if self.max < self.min:
            raise ValueError(f"max must not be below min, {self.min}")
        return self

    def lengths(self) -> Lengths:
        return Uniform(self.min, self.max)


class ConstantConfig(Strict):
    """Always the same; a bare number says the same."""

    distribution: Literal["constant"]
    tokens: Tokens

    def lengths(self) -> Lengths:
        return Constant(self.tokens)


class EmpiricalConfig(Strict):
    """Some lengths, drawn by weight (alike where no weights are given)."""

    distribution: Literal["empirical"]
    tokens: Annotated[tuple[Tokens, ...], Field(min_length=1)]
    weights: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] | None = None

    @model_validator(mode="after")
    def _weights_fit(self) -> EmpiricalConfig:
        self.lengths()
        return self

    def lengths(self) -> Lengths:
        return Empirical(self.tokens, self.weights)


def kind_of(value: Any) -> str:
    """Which form a value has; a bare number is a length."""
    if isinstance(value, dict):
        return str(value.get("distribution", "missing"))
    return str(getattr(value, "distribution", "number"))


K_KINDS = "a number, or a mapping with distribution: truncated_lognormal, uniform, constant or empirical"

LengthsConfig = Annotated[
    Annotated[Tokens, Tag("number")]
    | Annotated[LognormalConfig, Tag("truncated_lognormal")]
    | Annotated[UniformConfig, Tag("uniform")]
    | Annotated[ConstantConfig, Tag("constant")]
    | Annotated[EmpiricalConfig, Tag("empirical")],
    Discriminator(kind_of, custom_error_type="lengths", custom_error_message=f"expected {K_KINDS}"),
]


def lengths_of(config: LengthsConfig) -> Lengths:
    """The distribution that a file's value means."""
    return Constant(config) if isinstance(config, int) else config.lengths()
