"""What a simulated run leaves: compact columns, and from them rows in the form of run.json."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from prfaas.simulator.live import Live

K_QUANTILES = (0.5, 0.9, 0.95, 0.99)

_WORDS = re.compile(r"(?<!\S)[^\s\d]+(?!\S)").findall  # without a digit


class Record:
    """One number a column and request, so that a million requests take some 100 MB."""

    def __init__(self) -> None:
        self.index, self.prompt_tokens = array("q"), array("q")
        self.cached_tokens, self.output_tokens = array("q"), array("q")
        self.kv_bytes, self.moved_tokens, self.moved_bytes = array("q"), array("q"), array("q")
        self.arrival_s, self.ttft_s, self.e2e_s, self.transfer_s = (array("d") for _ in range(4))
        self.site, self.reason, self.error, self.slo = array("h"), array("i"), array("h"), array("d")
        self.names: list[str] = [""]
        self._name_ids: dict[str, int] = {"": 0}
        self.events: list[tuple[float, str]] = []
        self.link_rows: list[tuple[float, str, int, int]] = []
        """(at_s, link, bytes, backlog_bytes) of sampled intervals."""
        self.engine_rows: list[tuple[float, str, float, int, int]] = []
        """(at_s, site, prefill backlog s, running, waiting) of sampled moments."""
        self.log_rows: list[tuple[float, dict[str, float]]] = []
        """The policy's own figures at sampled moments."""
        self.refusals = 0

    def _name(self, text: str) -> int:
        found = self._name_ids.get(text)
        if found is None:
            if len(self.names) >= 32_000:
                text = "(other)"
                found = self._name_ids.get(text)
                if found is not None:
                    return found
            found = self._name_ids[text] = len(self.names)
            self.names.append(text)
        return found

    def request(self, live: Live, now: float, error: str | None) -> None:
        """The request is over."""
        request, decision = live.request, live.decision
        self.index.append(request.index)
        self.prompt_tokens.append(request.prompt_tokens)
        self.output_tokens.append(request.output_tokens)
        self.cached_tokens.append(live.cached_tokens)
        self.kv_bytes.append(live.kv_bytes)
        self.moved_tokens.append(live.moved_tokens)
        self.moved_bytes.append(live.moved_bytes)
        self.arrival_s.append(request.arrival_s)
        first = live.first_token_s
        self.ttft_s.append(math.nan if first is None else first - request.arrival_s)
        self.e2e_s.append(now - request.arrival_s)
        self.transfer_s.append(
            math.nan if first is None or live.prefilled_s is None else first - live.prefilled_s
        )
        site = decision.prefill_site if decision else None
        self.site.append(self._name(site or ""))
        # Reasons carry figures; what is kept is their kind: the words before the first figure.
        self.reason.append(self._name(_kind(decision.reason) if decision else ""))
        self.error.append(self._name(error or ""))
        due = decision.deadline_s if decision else None
        self.slo.append(math.nan if due is None else due - request.arrival_s)

    def event(self, at_s: float, text: str) -> None:
        self.events.append((at_s, text))

    def count_refusal(self) -> None:
        self.refusals += 1

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, model: str) -> Iterator[dict[str, Any]]:
        """Rows of run.json's `requests`."""
        names = self.names
        for i in range(len(self.index)):
            error = names[self.error[i]] or None
            ttft = self.ttft_s[i]
            yield {
                "id": str(self.index[i]),
                "model": model,
                "prompt_tokens": self.prompt_tokens[i],
                "output_tokens": self.output_tokens[i],
                "cached_tokens": self.cached_tokens[i],
                "site": names[self.site[i]] or None,
                "reason": names[self.reason[i]] or None,
                "sent_s": round(self.arrival_s[i], 6),
                "ttft_s": None if math.isnan(ttft) else round(ttft, 6),
                "e2e_s": round(self.e2e_s[i], 6),
                "kv_bytes": self.kv_bytes[i],
                "moved_tokens": self.moved_tokens[i],
                "tokens_equal": None,
                "error": error,
            }

    def summary(self, from_s: float = 0.0, to_s: float = math.inf) -> dict[str, Any]:
        """Figures over the requests that arrived in [from_s, to_s)."""
        arrival = np.frombuffer(self.arrival_s, dtype=np.float64) if len(self) else np.zeros(0)
        inside = (arrival >= from_s) & (arrival < to_s)
        count = int(inside.sum())
        if not count:
            return {"requests": 0}
        ttft = np.frombuffer(self.ttft_s, dtype=np.float64)[inside]
        e2e = np.frombuffer(self.e2e_s, dtype=np.float64)[inside]
        failed = np.frombuffer(self.error, dtype=np.int16)[inside] != 0
        kv = np.frombuffer(self.kv_bytes, dtype=np.int64)[inside]
        moved = np.frombuffer(self.moved_bytes, dtype=np.int64)[inside]
        slo = np.frombuffer(self.slo, dtype=np.float64)[inside]
        ended_s = arrival[inside] + e2e
        served = ttft[~np.isnan(ttft) & ~failed]
        span_s = float(arrival[inside].max() - arrival[inside].min())
        finish_s = float(ended_s[~failed].max() - arrival[inside].min()) if (~failed).any() else 0.0
        result: dict[str, Any] = {
            "requests": count,
            "failed": int(failed.sum()),
            "offered_rps": count / span_s if span_s else None,
            "throughput_rps": int((~failed).sum()) / finish_s if finish_s else None,
            "offloaded_share": float((kv > 0).mean()),
            "egress_gbps": float(kv.sum() + moved.sum()) * 8 / finish_s / 1e9 if finish_s else None,
            "moved_share": float((moved > 0).mean()),
            "refusals": self.refusals,
            "ttft_mean_s": float(served.mean()) if served.size else None,
            "within_slo": float(np.mean(~failed & (ttft <= slo))) if not np.isnan(slo).all() else None,
        }
        for q in K_QUANTILES:
            result[f"ttft_p{round(q * 100)}_s"] = float(np.quantile(served, q)) if served.size else None
        return result


def _kind(reason: str) -> str:
    """A reason without its figures, so that a million of them stay a few dozen."""
    return " ".join(_WORDS(reason))[:120]
