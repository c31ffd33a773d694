"""The raw rows of a run, narrowed to one part and one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prfaas.config.run import CalibrationRow, EventRow, LinkRow, RequestRow, Row, Run


def field(row: Row, name: str, default: object = None) -> object:
    """A field that the schema doesn't name."""
    return (row.model_extra or {}).get(name, default)


def number(row: Row, name: str) -> float | None:
    value = field(row, name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def numbers(row: Row, name: str) -> list[float]:
    value = field(row, name)
    return [float(item) for item in value] if isinstance(value, list) else []


@dataclass(frozen=True)
class View:
    """What a metric may look at."""

    run: Run
    part: str | None = None
    model: str | None = None

    def ours(self, row: Row) -> bool:
        """Whether the row belongs to this part and model."""
        if self.part is not None and field(row, "part") != self.part:
            return False
        model = getattr(row, "model", None) or field(row, "model")
        return self.model is None or model is None or model == self.model

    def repetitions(self) -> Iterator[tuple[int, list[RequestRow]]]:
        """Each valid repetition's requests; one model's requests of a repetition are one series."""
        for repetition in self.run.repetitions:
            rows = [row for row in repetition.requests if self.ours(row)]
            for model in dict.fromkeys(row.model for row in rows):
                yield repetition.index, [row for row in rows if row.model == model]

    def requests(self) -> list[RequestRow]:
        return [row for repetition in self.run.repetitions for row in repetition.requests if self.ours(row)]

    def answered(self) -> list[RequestRow]:
        """Those with a whole answer."""
        return [row for row in self.requests() if row.error is None and row.e2e_s is not None]

    def baseline(self) -> dict[tuple[str, str], RequestRow]:
        """The plain server's answers by (model, request)."""
        return {(row.model, row.id): row for row in self.run.baseline if self.ours(row)}

    def events(self, event: str | None = None) -> list[EventRow]:
        return [
            row
            for repetition in self.run.repetitions
            for row in repetition.events
            if self.ours(row) and (event is None or row.event == event)
        ]

    def links(self) -> list[LinkRow]:
        return [row for repetition in self.run.repetitions for row in repetition.links if self.ours(row)]

    def controls(self) -> list[Row]:
        return [row for row in self.run.controls if self.ours(row)]

    def calibration(self) -> list[CalibrationRow]:
        return [row for row in self.run.calibration if self.ours(row)]
