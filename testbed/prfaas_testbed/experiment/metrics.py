"""What a check can be about: each metric is one number computed from raw rows alone."""

from __future__ import annotations

import numpy as np

from prfaas.config.run import RequestRow
from prfaas_testbed.experiment import bounds, crossing, integrity, wire
from prfaas_testbed.experiment.registry import K_METRICS, Metric, Unsupported, metric
from prfaas_testbed.experiment.view import View, field, number, numbers

__all__ = [
    "K_METRICS",
    "Metric",
    "Unsupported",
    "bounds",
    "crossing",
    "equal_tokens",
    "integrity",
    "logprob_gap",
    "metric",
    "union_s",
    "wire",
]


def equal_tokens(row: RequestRow, plain: RequestRow | None) -> bool | None:
    """Whether both servers gave the same token ids; None where either gave no whole answer."""
    if plain is None or plain.error or row.error:
        return None
    ours, theirs = field(row, "output_ids"), field(plain, "output_ids")
    if not ours or not theirs:
        return None
    return ours == theirs


def logprob_gap(row: RequestRow, plain: RequestRow | None) -> float | None:
    """The largest difference of the logprobs of the tokens both chose, up to the first that differs."""
    if plain is None:
        return None
    ours, theirs = numbers(row, "logprobs"), numbers(plain, "logprobs")
    same = 0
    for a, b in zip(numbers(row, "output_ids"), numbers(plain, "output_ids"), strict=False):
        if a != b:
            break
        same += 1
    pairs = list(zip(ours[:same], theirs[:same], strict=False))
    return max((abs(a - b) for a, b in pairs), default=None)


def _some(rows: list[RequestRow]) -> list[RequestRow]:
    if not rows:
        raise Unsupported("no request")
    return rows


def crossed(rows: list[RequestRow]) -> list[RequestRow]:
    """Those whose KV came from another site; within one it moves too, over no link."""
    return [row for row in rows if field(row, "transfer") != "local"]


@metric("requests")
def _requests(view: View) -> float:
    """Requests of the smallest series: one model in one repetition."""
    return min((len(rows) for _, rows in view.repetitions()), default=0)


@metric("answered_share")
def _answered_share(view: View) -> float:
    """Share of requests with a whole answer."""
    return len(view.answered()) / len(_some(view.requests()))


@metric("lost")
def _lost(view: View) -> float:
    """Requests that were to be sent and have neither an answer nor an error."""
    loads = view.events("load")
    if not loads:
        raise Unsupported("no event says how many requests were to be sent")
    planned = sum(number(row, "requests") or 0 for row in loads)
    known = [row for row in view.requests() if row.error or row.e2e_s is not None]
    return planned - len(known)


@metric("in_flight_peak")
def _in_flight_peak(view: View) -> float:
    """Most requests open at once, in the series where that was least."""
    peaks = []
    for _, rows in view.repetitions():
        edges = sorted(
            (at_s, step)
            for row in rows
            if row.e2e_s is not None
            for at_s, step in ((row.sent_s, 1), (row.sent_s + row.e2e_s, -1))
        )
        open_now = peak = 0
        for _, step in edges:
            open_now += step
            peak = max(peak, open_now)
        peaks.append(peak)
    return min(peaks, default=0)


@metric("tokens_equal_share", needs=("baseline",))
def _tokens_equal_share(view: View) -> float:
    """Share of all requests whose token ids equal the plain server's; an unanswered one counts against it."""
    plain = view.baseline()
    if not plain:
        raise Unsupported("no plain server ran")
    rows = _some(view.requests())
    return sum(equal_tokens(row, plain.get((row.model, row.id))) is True for row in rows) / len(rows)


@metric("wrong_answers", needs=("baseline",))
def _wrong_answers(view: View) -> float:
    """Whole answers whose token ids differ from the plain server's."""
    plain = view.baseline()
    if not plain:
        raise Unsupported("no plain server ran")
    return sum(equal_tokens(row, plain.get((row.model, row.id))) is False for row in view.requests())


@metric("logprob_gap", needs=("baseline",))
def _logprob_gap(view: View) -> float:
    """Largest difference between a chosen token's logprob and the plain server's."""
    plain = view.baseline()
    gaps = [logprob_gap(row, plain.get((row.model, row.id))) for row in view.answered()]
    found = [gap for gap in gaps if gap is not None]
    if not found:
        raise Unsupported("no logprobs of both servers")
    return max(found)


@metric("bytes_gap_share")
def _bytes_gap_share(view: View) -> float:
    """The WAN's own byte count against payload, framing, control and retransmitted bytes: the largest gap."""
    rows = view.events("accounting")
    gaps = []
    for row in rows:
        counted, accounted = number(row, "wan_bytes"), number(row, "accounted_bytes")
        if counted is not None and accounted:
            gaps.append(abs(counted - accounted) / accounted)
    if not gaps:
        raise Unsupported("no site gave a whole account of its bytes")
    return max(gaps)


@metric("payload_bytes", "bytes")
def _payload_bytes(view: View) -> float:
    """KV and state that answered requests moved between sites."""
    return sum(row.kv_bytes or 0 for row in crossed(view.answered()))


@metric("controls_caught_share", needs=("controls",))
def _controls_caught_share(view: View) -> float:
    """Share of control requests, with a fault planted, that both comparisons (tokens and digests) caught."""
    rows = view.controls()
    if not rows:
        raise Unsupported("no control ran")
    caught = [row for row in rows if field(row, "tokens_caught") and field(row, "digest_caught")]
    return len(caught) / len(rows)


@metric("calibrated_share")
def _calibrated_share(view: View) -> float:
    """Share of link directions whose calibration was inside its bounds; where one was measured a second
    time, that is the one that counts."""
    rows = view.calibration()
    if not rows:
        raise Unsupported("no calibration")
    last = {(field(row, "part"), row.direction): row.inside for row in rows}
    return sum(last.values()) / len(last)


@metric("streams_cut")
def _streams_cut(view: View) -> float:
    """Connections that were reset while they carried data."""
    return sum(number(row, "streams") or 0 for row in view.events("cut_stream"))


@metric("events_missed")
def _events_missed(view: View) -> float:
    """Steps of the timeline that failed or that the load didn't wait for: the trouble that wasn't."""
    if not view.events("load"):
        raise Unsupported("no load ran")
    return sum(bool(field(row, "failed") or field(row, "skipped")) for row in view.events())


@metric("hostile_packets")
def _hostile_packets(view: View) -> float:
    """Packets that no well-behaved sender makes, put on the wire."""
    return sum(number(row, "packets") or 0 for row in view.events("hostile"))


@metric("event_lag_ms", "ms")
def _event_lag_ms(view: View) -> float:
    """Largest distance between a timeline event's planned and true time."""
    lags = [abs(lag) for row in view.events() if (lag := number(row, "lag_ms")) is not None]
    if not lags:
        raise Unsupported("no timeline event")
    return max(lags)


@metric("repetitions")
def _repetitions(view: View) -> float:
    """Valid repetitions."""
    return len({index for index, _ in view.repetitions()})


@metric("emulator_lag_p99_ms", "ms")
def _emulator_lag(view: View) -> float:
    """The emulator's own timer lag under load, the worst repetition's p99."""
    lags = [lag for row in view.events("watch") if (lag := number(row, "lag_p99_ms")) is not None]
    if not lags:
        raise Unsupported("native emulation has no timer of its own to watch")
    return max(lags)


@metric("unplanned_drops")
def _unplanned_drops(view: View) -> float:
    """Packets dropped that the emulation didn't mean to drop, over all valid repetitions."""
    rows = view.events("watch")
    if not rows:
        raise Unsupported("the emulator wasn't watched")
    return sum(number(row, "unplanned_drops") or 0 for row in rows)


@metric("throughput_rps", "requests/s")
def _throughput(view: View) -> float:
    """Answered requests per second of a series (first sent to last answered), the median series."""
    rates = []
    for _, rows in view.repetitions():
        done = [row for row in rows if row.error is None and row.e2e_s is not None]
        if done:
            span_s = max(row.sent_s + (row.e2e_s or 0) for row in done) - min(row.sent_s for row in done)
            rates.append(len(done) / span_s if span_s > 0 else 0.0)
    if not rates:
        raise Unsupported("no answered request")
    return float(np.median(rates))


@metric("goodput_mbps", "Mbit/s")
def _goodput(view: View) -> float:
    """Payload between sites over the time in which at least one transfer of it was under way, the median
    series."""
    rates = []
    for _, rows in view.repetitions():
        spans = [
            (start, end, row.kv_bytes or 0)
            for row in crossed(rows)
            if (start := number(row, "transfer_start_s")) is not None
            and (end := number(row, "transfer_end_s")) is not None
        ]
        busy_s = union_s([(start, end) for start, end, _ in spans])
        if busy_s > 0:
            rates.append(sum(size for _, _, size in spans) * 8 / busy_s / 1e6)
    if not rates:
        raise Unsupported("no transfer's times are known")
    return float(np.median(rates))


@metric("egress_mbps", "Mbit/s")
def _egress(view: View) -> float:
    """KV and state moved between sites over the whole series, the median series."""
    rates = []
    for _, rows in view.repetitions():
        done = [row for row in rows if row.error is None and row.e2e_s is not None]
        if done:
            span_s = max(row.sent_s + (row.e2e_s or 0) for row in done) - min(row.sent_s for row in done)
            if span_s > 0:
                rates.append(sum(row.kv_bytes or 0 for row in crossed(done)) * 8 / span_s / 1e6)
    if not rates:
        raise Unsupported("no answered request")
    return float(np.median(rates))


@metric("slo_share", needs=("slo_ttft_s", "router"))
def _slo_share(view: View) -> float:
    """Share of all requests whose first token came within slo_ttft_s (the experiment's, or the request's
    own)."""
    rows = _some(view.requests())
    definition = view.run.definition
    if view.part is not None:
        definition = definition.get("parts", {}).get(view.part, {})
    overall = definition.get("slo_ttft_s")
    good = 0
    for row in rows:
        slo_s = number(row, "slo_ttft_s") or overall
        if slo_s is None:
            raise Unsupported("no SLO")
        good += row.error is None and row.ttft_s is not None and row.ttft_s <= float(slo_s)
    return good / len(rows)


@metric("offloaded_share")
def _offloaded_share(view: View) -> float:
    """Share of answered requests prefilled in another site than they were decoded in."""
    rows = _some(view.answered())
    return sum(bool(row.kv_bytes) for row in crossed(rows)) / len(rows)


@metric("client_cpu_share")
def _client_cpu_share(view: View) -> float:
    """The load generator's share of one core, the largest."""
    shares = [share for row in view.events("load") if (share := number(row, "client_cpu_share")) is not None]
    if not shares:
        raise Unsupported("the load generator's CPU wasn't measured")
    return max(shares)


def _quantile(name: str, q: float) -> None:
    def compute(view: View) -> float:
        values = [value for row in view.answered() if (value := _of(row, name)) is not None]
        if not values:
            raise Unsupported(f"no request has {name}_s")
        return float(np.quantile(values, q))

    compute.__doc__ = f"The {q:.0%} quantile of {name}_s over all answered requests."
    metric(f"{name}_p{q * 100:.0f}_s", "s")(compute)


def _of(row: RequestRow, name: str) -> float | None:
    if name == "ttft":
        return row.ttft_s
    if name == "e2e":
        return row.e2e_s
    start, end = number(row, "transfer_start_s"), number(row, "transfer_end_s")
    return end - start if start is not None and end is not None else None


for _name in ("ttft", "e2e", "transfer"):
    for _q in (0.5, 0.9, 0.99):
        _quantile(_name, _q)


def union_s(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total
