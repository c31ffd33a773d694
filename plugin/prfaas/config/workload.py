"""The `workload:` of an experiment: which requests arrive when. prfaas.workload turns it into timed requests.

Kinds: `mooncake` and `azure` play a trace, `synthetic` draws independent requests, `sessions` draws
conversations whose turns extend one another. All are open loop: an arrival never waits for an answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from prfaas.config.lengths import LengthsConfig, Tokens
from prfaas.config.loading import Strict, unknown_name
from prfaas.model.errors import UsageError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=100_000_000)]
Name = Annotated[str, Field(min_length=1, max_length=64)]
Weights = dict[Name, Positive]
K_MOONCAKE_BLOCK_TOKENS = 512


class Common(Strict):
    """What every kind has."""

    requests: Count | None = None
    """Stop after so many."""
    duration_s: Positive | None = None
    """Stop before an arrival at or beyond this; with `requests`, whichever comes first."""
    tenants: Weights = Field(default_factory=dict)
    """Names and weights: each request (each session) is given one by chance. Empty: no tenant."""
    classes: Weights = Field(default_factory=dict)
    """SLO classes, likewise."""
    homes: tuple[Name, ...] = ()
    """Sites whose users ask, in turn: each request is decoded at its home. Empty: wherever the policy says.
    Simulated alone."""


class Poisson(Strict):
    """Independent arrivals: exponential gaps."""

    process: Literal["poisson"]
    rate_rps: Positive


class Paced(Strict):
    """Equal gaps."""

    process: Literal["paced"]
    rate_rps: Positive


class Gamma(Strict):
    """Bursty renewals: gamma gaps of a given coefficient of variation (1 is Poisson, 3 is bursty)."""

    process: Literal["gamma"]
    rate_rps: Positive
    cv: Annotated[float, Field(gt=0, le=20)]


class OnOff(Strict):
    """Poisson arrivals whose rate alternates between two levels."""

    process: Literal["on_off"]
    on_rps: Positive
    off_rps: Seconds = 0.0
    on_s: Positive
    off_s: Positive
    lengths: Literal["fixed", "exponential"] = "fixed"
    """Whether phases last exactly or on average so long."""


class Diurnal(Strict):
    """Poisson arrivals whose rate is mean × (1 + amplitude × sin(2π (t / period + phase)))."""

    process: Literal["diurnal"]
    mean_rps: Positive
    amplitude: Share
    period_s: Positive = 86_400.0
    phase: Share = 0.0


class AtOnce(Strict):
    """Everything at time 0: a backlog. Needs `requests`."""

    process: Literal["at_once"]


Arrivals = Annotated[Poisson | Paced | Gamma | OnOff | Diurnal | AtOnce, Field(discriminator="process")]


class SharedPrefix(Strict):
    """System prompts: some requests begin with one of a few common texts."""

    tokens: Tokens
    groups: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """How many different ones; each request draws one, alike."""
    share: Share = 1.0
    """How many requests begin with one."""


class Synthetic(Common):
    """Independent requests: arrivals and lengths from distributions."""

    kind: Literal["synthetic"] = "synthetic"
    arrivals: Arrivals
    input_tokens: LengthsConfig
    output_tokens: LengthsConfig
    block_tokens: Tokens = 64
    """Granularity of the prompts' block hashes."""
    shared_prefix: SharedPrefix | None = None
    """Counted within input_tokens; a prompt not longer than it is all prefix."""

    @model_validator(mode="after")
    def _ends(self) -> Synthetic:
        if self.requests is None and (self.duration_s is None or self.arrivals.process == "at_once"):
            raise ValueError("needs requests, or duration_s and arrivals that take time")
        return self


class Sessions(Common):
    """Conversations: each turn's prompt is the last prompt, its answer, and new tokens."""

    kind: Literal["sessions"] = "sessions"
    arrivals: Arrivals
    """Of sessions, not of turns."""
    sessions: Count | None = None
    """Start no more than so many."""
    turns: LengthsConfig
    """Turns of a session."""
    first_tokens: LengthsConfig
    """Tokens of the first question, system prompt not counted."""
    turn_tokens: LengthsConfig
    """Tokens of each later question."""
    output_tokens: LengthsConfig
    think_s: Positive
    """Mean of the exponential gap between a turn's arrival and the next one's, answering included."""
    max_tokens: Tokens = 131_072
    """A session ends before a turn whose prompt would be longer."""
    block_tokens: Tokens = 64
    shared_prefix: SharedPrefix | None = None
    """System prompts, in front of the first question."""

    @model_validator(mode="after")
    def _ends(self) -> Sessions:
        if self.arrivals.process == "at_once" and self.sessions is None:
            raise ValueError("sessions that begin at once need sessions: how many")
        if self.requests is None and self.duration_s is None and self.sessions is None:
            raise ValueError("needs requests, duration_s or sessions")
        return self


class TraceCommon(Common):
    """A recorded trace, played at its own rate or scaled."""

    file: Annotated[str, Field(min_length=1)]
    """A file under topologies/traces, or a path."""
    start_s: Seconds = 0.0
    """Leave out what comes before; time 0 is then here. In the trace's own seconds."""
    rate_scale: Positive | None = None
    """Play so many times as fast; duration_s counts played seconds."""
    rate_rps: Positive | None = None
    """Play at this mean rate instead."""
    arrivals: Arrivals | None = None
    """Play the trace's requests in their order, but at these arrivals: its lengths and prefixes without its
    bursts, or with others."""
    length_divisor: Annotated[float, Field(ge=1, le=1_000_000)] = 1.0
    """Prompts, and the blocks of their prefixes, are this many times shorter (rounded up); answers too."""
    max_input_tokens: Tokens | None = None
    """Longer prompts (after division) are cut here."""
    max_output_tokens: Tokens | None = None
    repeat: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Play the whole so many times over; prefixes aren't shared between rounds."""

    @model_validator(mode="after")
    def _one_rate(self) -> TraceCommon:
        if self.rate_scale is not None and self.rate_rps is not None:
            raise ValueError("give rate_scale or rate_rps, not both")
        if self.arrivals is not None and (self.rate_scale is not None or self.rate_rps is not None):
            raise ValueError("arrivals have their own rate: give them, or rate_scale or rate_rps")
        return self


class Mooncake(TraceCommon):
    """Mooncake's format: JSON lines; timestamp (ms), input_length, output_length, hash_ids (512 tokens)."""

    kind: Literal["mooncake"]
    bucket_s: Seconds = 3.0
    """The trace's arrivals are rounded to this; they are spread over the bucket by chance. 0: as they are."""

    @model_validator(mode="after")
    def _whole_blocks(self) -> Mooncake:
        if K_MOONCAKE_BLOCK_TOKENS % self.length_divisor:
            raise ValueError(f"length_divisor must divide a block's {K_MOONCAKE_BLOCK_TOKENS} tokens")
        return self

    @property
    def block_tokens(self) -> int:
        """Tokens of a block after division."""
        return int(K_MOONCAKE_BLOCK_TOKENS / self.length_divisor)


class Azure(TraceCommon):
    """Azure's format: CSV with TIMESTAMP, ContextTokens, GeneratedTokens; no prefixes."""

    kind: Literal["azure"]


WorkloadConfig = Annotated[Synthetic | Sessions | Mooncake | Azure, Field(discriminator="kind")]


def trace_lines(config: Synthetic | Sessions | Mooncake | Azure, topologies: Path) -> list[str]:
    """The trace's lines; none where the workload plays no trace. Raises UsageError listing what there is."""
    if not isinstance(config, TraceCommon):
        return []
    return read_trace(config.file, topologies)


def trace_file(file: str, topologies: Path) -> Path:
    """A trace by its name under topologies/traces or by path. Raises UsageError."""
    folder = topologies / "traces"
    path = folder / file
    if not path.is_file():
        path = Path(file)
    if not path.is_file():
        raise unknown_name("trace", file, folder, [one.name for one in folder.glob("*.*")])
    return path


def read_trace(file: str, topologies: Path) -> list[str]:
    """The lines of a trace by its name under topologies/traces or by path. Raises UsageError."""
    path = trace_file(file, topologies)
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: can't be read: {error}") from None
