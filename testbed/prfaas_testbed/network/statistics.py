"""How far a measured loss may lie from the wanted one by chance alone. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prfaas.config.topology import BurstyLoss, Impairments

K_CONFIDENCE = 0.999
K_Z = 3.2905  # of a two-sided interval of that confidence, normal
K_UNPLANNED = 1e-5  # a link without loss may still lose one packet in 100,000 on the way through this machine


@dataclass(frozen=True)
class Chain:
    """Gilbert-Elliott in probabilities; `good` and `bad` are the losses in the two states."""

    enter: float
    leave: float
    good: float
    bad: float

    @classmethod
    def of(cls, loss: BurstyLoss) -> Chain:
        return cls(
            loss.enter_percent / 100,
            loss.leave_percent / 100,
            loss.good_loss_percent / 100,
            loss.loss_percent / 100,
        )

    @property
    def in_bad(self) -> float:
        return self.enter / (self.enter + self.leave)

    @property
    def mean(self) -> float:
        return self.in_bad * self.bad + (1 - self.in_bad) * self.good

    @property
    def memory(self) -> float:
        """Correlation of the state from one packet to the next."""
        return 1 - self.enter - self.leave

    def covariance(self, lag: int) -> float:
        """Of the losses of two packets `lag` apart."""
        return self.in_bad * (1 - self.in_bad) * (self.bad - self.good) ** 2 * self.memory**lag

    @property
    def mean_burst(self) -> float:
        """Mean number of packets lost in a row: P(lost) / P(received, then lost)."""
        both = self.mean**2 + self.covariance(1)
        begun = self.mean - both
        return self.mean / begun if begun > 0 else math.inf

    def mean_deviation(self, packets: int) -> float:
        """Standard deviation of the share lost of so many packets in a row."""
        single = self.mean * (1 - self.mean)
        tail = self.covariance(1) / (1 - self.memory)  # the geometric sum of the covariances
        return math.sqrt(max(0.0, single + 2 * tail) / packets)


def binomial_interval(packets: int, probability: float) -> tuple[float, float]:
    """Shares that 99.9% of all tries of so many packets lose, each independently with this probability."""
    probability = max(probability, K_UNPLANNED)
    if probability >= 1:
        return 1.0, 1.0
    tail = (1 - K_CONFIDENCE) / 2
    low = high = -1
    below = 0.0
    for lost in range(packets + 1):
        below += math.exp(_log_binomial(packets, lost, probability))
        if low < 0 and below >= tail:
            low = lost
        if below >= 1 - tail:
            high = lost
            break
    return low / packets, (packets if high < 0 else high) / packets


def _log_binomial(packets: int, lost: int, probability: float) -> float:
    ways = math.lgamma(packets + 1) - math.lgamma(lost + 1) - math.lgamma(packets - lost + 1)
    return ways + lost * math.log(probability) + (packets - lost) * math.log1p(-probability)


def chain_interval(packets: int, chain: Chain) -> tuple[float, float]:
    """Shares lost by the chain's own variance; a burst is the least that can be lost."""
    half = K_Z * chain.mean_deviation(packets)
    return max(0.0, chain.mean - half), chain.mean + half + chain.mean_burst / packets


def burst_interval(bursts: int, chain: Chain) -> tuple[float, float]:
    """Mean lengths of so many bursts, as if geometric with the chain's mean."""
    mean = chain.mean_burst
    half = K_Z * math.sqrt(max(mean * (mean - 1), 0.25) / bursts)
    return max(1.0, mean - half), mean + half


def damage(state: Impairments, frame_bytes: int) -> float:
    """Share of UDP datagrams lost to corruption: a flipped bit in the frame's source address alone does no
    harm.
    """
    return state.corrupt_percent / 100 * (1 - 6 / frame_bytes)


def survival(states: Sequence[Impairments], frame_bytes: int) -> float:
    """Share of datagrams that pass all of a path's links."""
    share = 1.0
    for state in states:
        share *= (1 - state.mean_loss) * (1 - damage(state, frame_bytes))
    return share


def packets_needed(loss: float, most: int, mean_burst: float = 1.0) -> int:
    """At least 20/p, or as many times the packets of a burst where losses come in bursts, so that some twenty
    of either are seen; 10,000 where none are wanted; no more than `most`.
    """
    wanted = (
        10_000 if loss <= 0 else 20 * mean_burst / loss
    )  # of a link that never leaves its bad state: no end
    return max(math.ceil(min(wanted, most)), min(2000, most))
