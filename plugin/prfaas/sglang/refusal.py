"""What a refused transfer is called wherever it is told: in the text that crosses SGLang's control channel,
in a request's finish reason, and in the answer that its client gets.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import msgspec

K_CODE = "prfaas_refused"
K_STATUS = 503
K_RETRY_AFTER_S = 5.0
"""Told where the ledger doesn't know when asking again may help."""
_TEXT = re.compile(rf"{K_CODE}: (?P<reason>[^;]*); retry_after_s=(?P<retry>\d+\.\d\d)")


@dataclass(frozen=True)
class Refusal:
    """A link had no place for a request's bytes."""

    reason: str
    retry_after_s: float

    @property
    def text(self) -> str:
        """For logs and control messages; `found_in` reads it again, whatever surrounds it."""
        return f"{K_CODE}: {self.reason.replace(';', ',')}; retry_after_s={self.retry_after_s:.2f}"

    @classmethod
    def found_in(cls, text: str) -> Refusal | None:
        """The refusal that a failure's text tells of, if it does."""
        found = _TEXT.search(text)
        return cls(found["reason"], float(found["retry"])) if found else None

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Of the answer: Retry-After has whole seconds, and rounding down would invite clients too soon."""
        return [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(self.body)).encode()),
            (b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode()),
        ]

    @property
    def body(self) -> bytes:
        """OpenAI's form of an error."""
        error = {"message": self.text, "type": K_CODE, "param": None, "code": K_CODE}
        return msgspec.json.encode({"error": error})
