"""Profile files (topologies/profiles/*.yaml), and profiles written inside a case."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from prfaas.config.loading import Strict, is_path, load, unknown_name
from prfaas.model.errors import ConfigError
from prfaas.model.profiles import K_MIB, Curve, DecodeProfile, Profile, ProfileError, RoleSwitch, check_points

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Points = Annotated[tuple[Positive, ...], Field(min_length=1)]
Source = Literal["published", "solved back", "measured", "made up"]


def _rising(values: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
    """Refuse points that fall; where `tokens` is itself at fault, its own error is reported alone."""
    tokens = info.data.get("tokens")
    if tokens is not None:
        try:
            check_points(tokens, values, str(info.field_name))
        except ProfileError as error:
            raise ValueError(error.problem) from None
    return values


class CurvesConfig(Strict):
    """Prefill times and, where the instance is a sender, KV sizes at some prompt lengths."""

    tokens: Points
    """Prompt lengths, rising."""
    prefill_s: Points
    """T_prefill at each, seconds."""
    kv_mib: Points | None = None
    """S_kv at each, MiB, state included."""
    kv_bytes: Points | None = None
    """S_kv at each, bytes, state included."""
    kv_bytes_per_token: Positive | None = None
    """S_kv = state_bytes + this x tokens: instead of a list."""
    state_bytes: Annotated[int, Field(ge=0)] = 0
    """Part of S_kv that is recurrent or window state, the same at every length."""

    @field_validator("tokens")
    @classmethod
    def _tokens_rise(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        try:
            check_points(value, [1.0] * len(value), "tokens")
        except ProfileError as error:
            raise ValueError(error.problem) from None
        return value

    _prefill_rises = field_validator("prefill_s")(_rising)
    _mib_rises = field_validator("kv_mib")(_rising)
    _bytes_rise = field_validator("kv_bytes")(_rising)

    @model_validator(mode="after")
    def _one_size(self) -> CurvesConfig:
        given = [n for n in ("kv_mib", "kv_bytes", "kv_bytes_per_token") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(
                f"give one of kv_mib, kv_bytes and kv_bytes_per_token, not {' and '.join(given)}"
            )
        kv = self.kv_curve()
        if kv is not None and self.state_bytes > kv.y[0]:
            raise ValueError(f"state_bytes is more than S_kv at {kv.x[0]:g} tokens, {kv.y[0]:.0f} bytes")
        return self

    def prefill_curve(self) -> Curve:
        return Curve(self.tokens, self.prefill_s, "prefill_s")

    def kv_curve(self) -> Curve | None:
        """S_kv; None where the file gives no sizes."""
        if self.kv_mib is not None:
            return Curve(self.tokens, tuple(v * K_MIB for v in self.kv_mib), "kv_mib")
        if self.kv_bytes is not None:
            return Curve(self.tokens, self.kv_bytes, "kv_bytes")
        if self.kv_bytes_per_token is not None:
            sizes = tuple(self.state_bytes + self.kv_bytes_per_token * t for t in self.tokens)
            return Curve(self.tokens, sizes, "kv_bytes_per_token")
        return None


class DecodeConfig(Strict):
    """Batched decode: `step_s` alone, or a list over `batch`."""

    max_batch: Annotated[int, Field(ge=1)]
    batch: Points | None = None
    """Batch sizes at which step_s was measured."""
    step_s: Positive | Points

    @model_validator(mode="after")
    def _shapes_fit(self) -> DecodeConfig:
        self.profile()
        return self

    def profile(self) -> DecodeProfile:
        if isinstance(self.step_s, float):
            if self.batch is not None:
                raise ValueError("batch lists the batch sizes of a list of step_s; step_s is one number")
            return DecodeProfile.constant(self.step_s, self.max_batch)
        if self.batch is None:
            raise ValueError("a list of step_s needs the batch sizes it was measured at: batch")
        return DecodeProfile(self.max_batch, Curve(self.batch, self.step_s, "step_s"))


class RoleSwitchConfig(Strict):
    """Seconds that an idle instance takes to change its role (SGLang's `/pd_role_switch`, to its answer)."""

    to_prefill_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    to_decode_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    source: Source
    """Where these two come from: the profile's other figures may come from elsewhere."""


class ProfileConfig(CurvesConfig):
    """A profile file: one model on one kind of instance."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=64)]
    description: Annotated[str, Field(min_length=1, max_length=600)]
    source: Source
    """Where the numbers come from."""
    gpus: Annotated[int, Field(ge=0)] = 8
    """GPUs of one instance; 0 on CPUs."""
    decode: DecodeConfig | None = None
    block_tokens: Annotated[int, Field(ge=1)] = 64
    chunk_tokens: Annotated[int, Field(ge=1)] = 8192
    pool_tokens: Annotated[int, Field(ge=1)] | None = None
    role_switch: RoleSwitchConfig | None = None
    """What a change between prefill and decode takes; absent: not known, and reckoned as nothing."""
    latency_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Part of prefill_s in which a request doesn't keep the instance from the next one."""

    @model_validator(mode="after")
    def _has_sizes(self) -> ProfileConfig:
        if self.kv_curve() is None:
            raise ValueError("a profile file needs kv_mib, kv_bytes or kv_bytes_per_token")
        if self.latency_s >= self.prefill_s[0]:
            raise ValueError(
                f"latency_s {self.latency_s:g} isn't below the least prefill_s, {self.prefill_s[0]:g}"
            )
        return self

    def profile(self) -> Profile:
        kv = self.kv_curve()
        assert kv is not None  # _has_sizes
        switch = self.role_switch
        return Profile(
            name=self.name,
            prefill=self.prefill_curve(),
            kv=kv,
            state_bytes=self.state_bytes,
            decode=self.decode.profile() if self.decode else None,
            block_tokens=self.block_tokens,
            chunk_tokens=self.chunk_tokens,
            pool_tokens=self.pool_tokens,
            gpus=self.gpus,
            latency_s=self.latency_s,
            role_switch=RoleSwitch(switch.to_prefill_s, switch.to_decode_s) if switch else None,
        )


def load_profile(path: Path | str) -> Profile:
    """A profile file. Raises UsageError, ConfigError."""
    return load(path, ProfileConfig).profile()


def profile_file(name: str, topologies: Path) -> Path:
    """The file of a name under topologies/profiles, or the path itself. Raises UsageError that lists what
    there is."""
    if is_path(name):
        return Path(name)
    folder = topologies / "profiles"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise unknown_name("profile", name, folder, [one.stem for one in folder.glob("*.yaml")])
    return path


def find_profile(name: str, topologies: Path) -> Profile:
    """A profile by name under topologies/profiles, or by path. Raises UsageError that lists what there is."""
    path = profile_file(name, topologies)
    if str(path) == name:
        return load_profile(path)
    found = load(path, ProfileConfig)
    if found.name != name:
        raise ConfigError(str(path), "name", found.name, f"the file's name says {name}")
    return found.profile()
