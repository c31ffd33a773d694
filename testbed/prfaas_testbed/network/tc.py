"""Link states as tc commands, and what `tc -j qdisc` must then show. Pure: nothing is run here.

One directed link is one device with netem at the root (1:) for delay, loss and damage, and a token bucket
below it (2:) for rate and queue. netem first, so that the queue is counted in bytes by the bucket alone and
its overflow (a congested link) is told apart from netem's drops (a lossy one). netem's own `limit` never
binds.
"""

from __future__ import annotations

from typing import Any

from prfaas.config.topology import K_FRAME_OVERHEAD_BYTES, Impairments

K_HELD_PACKETS = 200_000  # netem's limit: more than any link here holds in flight and in its queue together
K_UNLIMITED_BPS = 40_000_000_000
# The bucket's depth in time. Tokens of a longer stall are lost: in turns, with the timers' lag at 1 to 2 ms
# at p99, a full link of 100 Mbit/s carried 98.2 by 1 ms, 99.0 by 2 and 99.6 by 3. But so much passes at once
# after a rest, ahead of its time by as long.
K_BURST_S = 0.003
K_ORDER_BPS = (
    32_000_000_000  # netem keeps packets in order when it has a rate; this one costs 0.4 µs a packet
)

Command = list[str]


def qdisc_commands(device: str, state: Impairments, verb: str = "add") -> list[Command]:
    """Arguments of tc, a list a command, that put `device` into `state`; verb is `add` or `change`."""
    dev = ["qdisc", verb, "dev", device]
    commands = [[*dev, "root", "handle", "1:", *netem_arguments(state)]]
    commands.append([*dev, "parent", "1:1", "handle", "2:", *bucket_arguments(state)])
    if state.ecn:
        commands.append([*dev, "parent", "2:1", "handle", "3:", *red_arguments(state)])
    elif state.queue_packets is not None:
        commands.append([*dev, "parent", "2:1", "handle", "3:", "pfifo", "limit", str(state.queue_packets)])
    return commands


def netem_arguments(state: Impairments) -> Command:
    """Every parameter each time: in a `change`, netem keeps what is left out."""
    words = ["netem", "limit", str(K_HELD_PACKETS), "delay", f"{round(state.delay_ms * 1000)}us"]
    if state.jitter_ms:
        words += [f"{round(state.jitter_ms * 1000)}us"]
        if state.jitter_distribution != "uniform":
            words += ["distribution", state.jitter_distribution]
    if state.down:
        words += ["loss", "random", "100%"]
    elif state.bursty_loss is not None:
        b = state.bursty_loss
        steps = (b.enter_percent, b.leave_percent, b.loss_percent, b.good_loss_percent)
        words += ["loss", "gemodel", *(percent(step) for step in steps)]
    else:
        words += ["loss", "random", percent(state.loss_percent)]
    words += ["corrupt", percent(state.corrupt_percent), "duplicate", percent(state.duplicate_percent)]
    if state.delay_ms:
        words += ["reorder", percent(state.reorder_percent)]
    words += ["rate", f"{K_ORDER_BPS if state.jitter_ms else 0}bit"]
    return words


def bucket_arguments(state: Impairments) -> Command:
    bps = rate_bps(state)
    return ["tbf", "rate", f"{bps}bit", "burst", f"{burst_bytes(state)}b", "limit", f"{limit_bytes(state)}b"]


def red_arguments(state: Impairments) -> Command:
    """Marks from a quarter of the queue, surely at three quarters (Floyd and Jacobson's ratio of
    thresholds).
    """
    frame_bytes = state.mtu_bytes + K_FRAME_OVERHEAD_BYTES
    limit = state.buffer_bytes
    low = max(limit // 4, frame_bytes)
    high = max(3 * limit // 4, 2 * low)
    return [
        "red", "limit", f"{max(limit, high)}b", "min", f"{low}b", "max", f"{high}b", "avpkt",
        f"{frame_bytes}b", "burst", str(max(1, (2 * low + high) // (3 * frame_bytes)) + 1), "probability",
        "0.1", "bandwidth", f"{rate_bps(state)}bit", "ecn",
    ]  # fmt: skip


def rate_bps(state: Impairments) -> int:
    return K_UNLIMITED_BPS if state.rate_mbps is None else round(state.rate_mbps * 1e6)


def burst_bytes(state: Impairments) -> int:
    return max(2 * (state.mtu_bytes + K_FRAME_OVERHEAD_BYTES), round(rate_bps(state) / 8 * K_BURST_S))


def limit_bytes(state: Impairments) -> int:
    """tc's `limit` of the bucket: its queue of waiting bytes."""
    return max(state.buffer_bytes, 2 * (state.mtu_bytes + K_FRAME_OVERHEAD_BYTES))


def percent(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".") + "%"


def differences(state: Impairments, shown: list[dict[str, Any]]) -> list[str]:
    """What of `tc -j qdisc show dev …` is not `state`: one text a difference, none when all is as wanted."""
    by_handle = {row.get("handle"): row for row in shown}
    found: list[str] = []
    netem, bucket = by_handle.get("1:"), by_handle.get("2:")
    if netem is None or netem["kind"] != "netem":
        return ["no netem at the root"]
    if bucket is None or bucket["kind"] != "tbf":
        return ["no token bucket below netem"]
    options = netem["options"]
    delay = options.get("delay", {})
    _compare(found, "delay in s", round(state.delay_ms * 1000) / 1e6, delay.get("delay", 0.0), 2e-6)
    _compare(found, "jitter in s", round(state.jitter_ms * 1000) / 1e6, delay.get("jitter", 0.0), 2e-6)
    _compare(found, "limit in packets", K_HELD_PACKETS, options.get("limit", 0), 0)
    if state.bursty_loss is not None and not state.down:
        shown_chain = options.get("loss-gemodel", {})
        b = state.bursty_loss
        for key, wanted in (
            ("p", b.enter_percent),
            ("r", b.leave_percent),
            ("1-h", b.loss_percent),
            ("1-k", b.good_loss_percent),
        ):
            _compare(found, f"bursty loss {key}", wanted / 100, shown_chain.get(key, -1.0), 1e-6)
    else:
        wanted = 1.0 if state.down else state.loss_percent / 100
        _compare(found, "random loss", wanted, options.get("loss-random", {}).get("loss", 0.0), 1e-6)
    for name in ("corrupt", "duplicate", "reorder"):
        wanted = getattr(state, f"{name}_percent") / 100
        _compare(found, name, wanted, options.get(name, {}).get(name, 0.0), 1e-6)
    _compare(
        found, "rate in bytes/s", rate_bps(state) / 8, bucket["options"].get("rate", 0), rate_bps(state) / 8e6
    )
    _compare(
        found,
        "burst in bytes",
        burst_bytes(state),
        bucket["options"].get("burst", 0),
        burst_bytes(state) / 50 + 64,
    )
    third = by_handle.get("3:", {}).get("kind")
    wanted_third = "red" if state.ecn else "pfifo" if state.queue_packets is not None else None
    if third != wanted_third and not (wanted_third is None and third is None):
        found.append(f"queue below the bucket: wanted {wanted_third}, found {third}")
    return found


def _compare(found: list[str], name: str, wanted: float, shown: float, tolerance: float) -> None:
    if abs(wanted - shown) > tolerance:
        found.append(f"{name}: wanted {wanted:g}, found {shown:g}")
