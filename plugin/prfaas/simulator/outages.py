"""Streams over a link that is down for a while: when they carry again.

Nothing is given up because a link is down, or believed to be: pumps and servers wait, as TCP does. A stream
tries again after its retransmission time-out, each time twice as long after the one before (RFC 6298 section
5.5), so that it finds out late that the link is back. One on which nothing was acknowledged for `stall_s` is
replaced by the pump, whose new connection asks again after the kernel's first second, and after the pump's
own time-out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from prfaas.config.pump import PumpConfig
from prfaas.simulator.flows import rto_s

K_STALL_S: float = PumpConfig.model_fields["stall_s"].default
K_STALL_RTTS = 8  # as the pump's
K_LOOK_S = 0.05  # on average, until the pump next looks at its streams, ten times a second
K_SYN_S = 1.0  # until a connection's first packet is sent again (RFC 6298 section 2.1), and again: Linux
K_SYN_LINEAR = 4  # does so after equal times at first (tcp_syn_linear_timeouts, since 6.5)
K_CONNECT_S = 3.0  # as the pump's: then it dials anew
K_PAUSE_S = (0.1, 1.0)  # after a pause, doubled each time up to the second, as the pump's
K_OPENING_RTTS = 3  # TCP, TLS 1.3 and the pumps' own greeting


def repeats_s(rtt_s: float, *, opening: bool) -> Iterator[float]:
    """Seconds from each time that a request is sent to the next, while none arrives: over a connection that
    is kept, or one that it opens.
    """
    if opening:
        yield from itertools.repeat(K_SYN_S, K_SYN_LINEAR)
    wait_s = 2 * K_SYN_S if opening else rto_s(rtt_s)
    while True:
        yield wait_s
        wait_s *= 2


def resumes_after_s(down_s: float, rtt_s: float) -> tuple[float, bool]:
    """Streams began to send into a dead link, which is back down_s later: how long after they began they
    carry again, and whether those are new ones.
    """
    stalled_s = max(K_STALL_S, K_STALL_RTTS * rtt_s)
    for again_s in itertools.accumulate(repeats_s(rtt_s, opening=False)):
        if again_s + rtt_s > stalled_s:
            break
        if again_s >= down_s:
            return again_s, False
    dialled_s, pause_s = stalled_s + K_LOOK_S, K_PAUSE_S[0]
    while True:
        for asks in range(math.ceil(K_CONNECT_S / K_SYN_S)):
            asked_s = dialled_s + asks * K_SYN_S
            if asked_s >= down_s:
                return asked_s + K_OPENING_RTTS * rtt_s, True
        dialled_s += K_CONNECT_S + pause_s
        pause_s = min(K_PAUSE_S[1], 2 * pause_s)
