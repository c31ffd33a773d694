"""What one instance takes: prefill time, KV size, decode steps. The planner, the policies, the simulator and
profiled instances all read the same objects.

A `Curve` is piecewise linear between measured points and continues with the end segments' slopes beyond them;
whoever reports a figure says where it was extrapolated (`Curve.covers`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

K_MIB = 1 << 20  # bytes


class ProfileError(ValueError):
    """A profile that can't be true. `name` is the faulty field; the message says what was found."""

    def __init__(self, name: str, problem: str) -> None:
        self.name, self.problem = name, problem
        super().__init__(f"{name}: {problem}")


@dataclass(frozen=True, slots=True)
class Curve:
    """A function that never falls, piecewise linear through (x, y).

    x rises strictly and is positive, y is positive and never falls; `name` is used in errors alone. Beyond
    the last point the last segment's slope continues. Before the first point the first segment's slope does,
    but the curve stays above the straight line to the origin: no length has a negative time or size.
    One point means a straight line through the origin. Raises ProfileError.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    name: str = "curve"
    _slopes: tuple[float, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        check_points(self.x, self.y, self.name)
        if len(self.x) == 1:
            slopes: tuple[float, ...] = (self.y[0] / self.x[0],)
        else:
            slopes = tuple(
                (self.y[i + 1] - self.y[i]) / (self.x[i + 1] - self.x[i]) for i in range(len(self.x) - 1)
            )
        object.__setattr__(self, "_slopes", slopes)

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float], name: str = "curve") -> Curve:
        return cls(tuple(float(v) for v in x), tuple(float(v) for v in y), name)

    def __call__(self, at: float) -> float:
        """The value at `at` ≥ 0."""
        x, y, slopes = self.x, self.y, self._slopes
        i = bisect_right(x, at) - 1
        if i < 0:
            line = y[0] + (at - x[0]) * slopes[0]
            return max(line, y[0] * max(at, 0.0) / x[0])
        if i == len(slopes):  # the last point, or beyond
            i -= 1
        return y[i] + (at - x[i]) * slopes[i]

    def covers(self, at: float) -> bool:
        """Whether `at` lies among the measured points: beyond them, values are extrapolated."""
        return self.x[0] <= at <= self.x[-1]

    def scaled(self, factor: float) -> Curve:
        return Curve(self.x, tuple(v * factor for v in self.y), self.name)


def check_points(x: Sequence[float], y: Sequence[float], name: str) -> None:
    """Raises ProfileError unless x rises from above 0 and y, as long, is positive and never falls."""
    if not x:
        raise ProfileError("tokens", "needs at least one point")
    if len(x) != len(y):
        raise ProfileError(name, f"has {len(y)} values for {len(x)} points")
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        if not 0 < a < float("inf"):
            raise ProfileError("tokens", f"found {a:g} at place {i + 1}; each must be above 0 and finite")
        if not 0 < b < float("inf"):
            raise ProfileError(name, f"found {b:g} at {a:g}; each must be above 0 and finite")
        if i and a <= x[i - 1]:
            raise ProfileError(
                "tokens", f"{a:g} follows {x[i - 1]:g}; each must be greater than the one before"
            )
        if i and b < y[i - 1]:
            raise ProfileError(
                name, f"falls from {y[i - 1]:g} at {x[i - 1]:g} to {b:g} at {a:g}; must not fall"
            )


@dataclass(frozen=True, slots=True)
class DecodeProfile:
    """Batched decode of one instance."""

    max_batch: int
    """BS_max: most requests decoded at once."""
    step: Curve
    """Seconds a step takes, over the number of requests in the batch; one step gives each a token."""

    @classmethod
    def constant(cls, step_s: float, max_batch: int) -> DecodeProfile:
        """T_decode the same for every batch up to the limit, as the report has it."""
        return cls(max_batch, Curve((1.0, 2.0), (step_s, step_s), "decode.step_s"))

    def step_s(self, batch: float | None = None) -> float:
        """T_decode at `batch` requests; at the batch limit where None."""
        return self.step(self.max_batch if batch is None else batch)


@dataclass(frozen=True, slots=True)
class RoleSwitch:
    """What it takes an idle instance to change between prefill and decode: it serves nothing meanwhile."""

    to_prefill_s: float
    to_decode_s: float

    def __post_init__(self) -> None:
        for name in ("to_prefill_s", "to_decode_s"):
            value: float = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ProfileError(f"role_switch.{name}", f"found {value:g}; must be 0 or more, and finite")

    def seconds(self, to_prefill: bool) -> float:
        return self.to_prefill_s if to_prefill else self.to_decode_s


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of instance: a model on some hardware."""

    name: str
    prefill: Curve
    """T_prefill(l): seconds over tokens."""
    kv: Curve
    """S_kv(l): bytes that a decode instance needs after prefilling l tokens, state included."""
    state_bytes: int = 0
    """Part of S_kv that is recurrent (or window) state: the same at every length, and reusable only at
    exactly the length where it was saved."""
    decode: DecodeProfile | None = None
    """None: this kind of instance doesn't decode."""
    block_tokens: int = 64
    """Tokens of a block of the prefix cache: only whole blocks are found again."""
    chunk_tokens: int = 8192
    """Most tokens of one prefill step."""
    pool_tokens: int | None = None
    """Tokens of KV it can hold, running requests and prefix cache together; None: not limited."""
    gpus: int = 8
    role_switch: RoleSwitch | None = None
    """None: not known."""
    latency_s: float = 0.0
    """Part of T_prefill in which a request doesn't occupy the instance: it is read, its token handed out.
    Who waits behind it doesn't wait for that."""
    scale: float = field(default=1.0)
    """Bytes are already divided by this; see `scaled`."""

    def __post_init__(self) -> None:
        if not 0 <= self.state_bytes <= self.kv.y[0]:
            raise ProfileError(
                "state_bytes",
                f"found {self.state_bytes}; must lie between 0 and the least S_kv, {self.kv.y[0]:.0f}",
            )
        if not 0 <= self.latency_s < self.prefill.y[0]:
            raise ProfileError(
                "latency_s",
                f"found {self.latency_s:g}; must be below the least T_prefill, {self.prefill.y[0]:g} s",
            )

    def prefill_s(self, tokens: float, cached_tokens: float = 0) -> float:
        """Seconds to prefill `tokens`, the first `cached_tokens` of which are in the cache.

        T(tokens) where nothing is cached. Else the start-up T(0) and the difference T(tokens) − T(cached):
        new tokens cost what they cost at their place, attention over the cached ones included. The time of
        a chunk [a, b) is therefore prefill_s(b, c) − prefill_s(a, c).
        """
        if cached_tokens <= 0:
            return self.prefill(tokens)
        return self.prefill(0.0) + self.prefill(tokens) - self.prefill(min(cached_tokens, tokens))

    def occupied_s(self, tokens: float, cached_tokens: float = 0) -> float:
        """The part of `prefill_s` that keeps others waiting."""
        return max(0.0, self.prefill_s(tokens, cached_tokens) - self.latency_s)

    def kv_bytes(self, tokens: float) -> int:
        """S_kv: all bytes of a prompt of this length, state included."""
        return round(self.kv(tokens))

    def transfer_bytes(self, tokens: float, cached_tokens: float = 0) -> int:
        """Bytes to send for a prompt of which the receiver holds the first `cached_tokens`: KV of the rest,
        and the state, which is never reused from a shorter length."""
        if cached_tokens <= 0:
            return self.kv_bytes(tokens)
        return round(self.state_bytes + max(0.0, self.kv(tokens) - self.kv(min(cached_tokens, tokens))))

    def kv_throughput_bps(self, tokens: float) -> float:
        """Φ(l) = S_kv(l) / T_prefill(l), in bits a second."""
        return 8 * self.kv(tokens) / self.prefill(tokens)

    def covers(self, tokens: float) -> bool:
        """Whether times and sizes at this length are measured rather than extrapolated."""
        return self.prefill.covers(tokens) and self.kv.covers(tokens)

    def scaled(self, factor: float) -> Profile:
        """Bytes divided by `factor`, times unchanged: for links divided by the same factor."""
        if not factor > 0:
            raise ProfileError("scale", f"found {factor:g}; must be above 0")
        return replace(
            self,
            kv=self.kv.scaled(1 / factor),
            state_bytes=int(self.state_bytes / factor),
            scale=self.scale * factor,
        )
