"""Which number of streams carries most: found by trying, for no measurement of a link tells it beforehand.

Random loss wants as many as there may be (200 Mbit/s, 40 ms, 1%: 36 carried 110 Mbit/s, 48 136, 64 165).
The same loss in bursts takes most of a small window at once, and beyond some number more of them carry less:
36 to 48 carried 166 to 186, 64 no more than 134 to 153. Both look alike in loss and round trip. So what
decides is the response, the goodput that the receiver has acknowledged:

    rushing   while packets are lost and none waits in a queue, the number is multiplied, as soon as the
              goodput of the one before has come to rest. A step that didn't pay is taken back, and ends it.
    tuning    the next smaller or larger number is tried beside the good one, for long enough to see through
              the noise: a smaller one becomes the good one if it carries as much (K_AS_GOOD), a larger one if
              it carries more (K_BETTER); between the two lies what keeps noise from moving it to and fro.
              A try that paid is followed by another of the same kind at once; one that didn't, or took back
              the one before, by one of the other kind after a pause, which doubles up to K_PAUSE_MOST_LOOKS.

A rest ends a try, which is made again later; the good number stays. Time is counted in looks: a link that is
used rarely is tried no more often than it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

K_LOSS = 2e-4
"""Less asks for no streams."""
K_LOSS_HIGH = 5e-3
K_FINE_FROM = 16
K_STEP, K_STEP_FINE = 1.5, 1.2
"""Tries are of the first, and two of every four that didn't pay of the second: a peak may lie between."""
K_GAIN = 1.08
"""Less than so much more goodput for a step in the rush didn't pay."""
K_RISING, K_RUSH_LOOKS = 1.1, 5
"""Goodput hasn't come to rest while a look shows so much more than the one before. That, or for a queue to go
that a busy machine may have made, is waited for so many looks at most."""
K_AS_GOOD, K_BETTER = 0.97, 1.08
K_BASE_LOOKS, K_TRY_LOOKS = 8, 8
"""Looks at the good number that a try is held against, and looks that it takes, of which the first half
counts only where it is clear: windows take many round trips to become what the new number allows."""
K_CLEAR_LOOKS, K_CLEARLY_WORSE, K_CLEARLY_BETTER = 3, 0.8, 1.25
K_PAUSE_LOOKS, K_PAUSE_MOST_LOOKS = 12, 480
K_OTHER_LOSS = 3.0
"""So many times the loss of when the number was found: another path, it may rush again."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was measured over some round trips at one number of streams that had enough to send."""

    goodput_bps: float
    loss: float
    full: bool
    """Whether packets waited in a queue: then the link is likely full, and the loss its own."""


class Climb:
    """`wanted` is the number to use now, `good` the one to come back to. No clock of its own."""

    def __init__(self, least: int, most: int, *, remembered: int = 0) -> None:
        self._least, self._most = least, most
        self.wanted = self.good = min(max(least, remembered), most)
        self._rushing = not remembered
        self._looks: list[Look] = []
        """At `wanted`, but for the first after a change."""
        self._fresh = True
        self._base: list[Look] = []
        self._before_bps: float | None = None
        self._up = False
        self._moved_up: bool | None = None
        self._wait_looks = 0
        """Before the next try."""
        self._pause_looks = K_PAUSE_LOOKS
        self._unpaid = 0
        self._loss = 0.0

    def at_least(self, least: int) -> None:
        """Fewer than these aren't tried: what the path's length asks for."""
        self._least = min(least, self._most)
        if self.good < self._least:
            self.good = self._least
        if self.wanted < self._least:
            self._use(self._least)

    def rest(self) -> None:
        """There has been nothing to send for a while."""
        if self._rushing:
            self._looks = []
        elif self.wanted != self.good:
            self._use(self.good)
            self._looks = self._base
        self._fresh = True

    def look(self, look: Look, *, may_grow: bool) -> None:
        """The next look at `wanted`. `may_grow`: whether more streams could help at all."""
        if self._rushing:
            self._looks.append(look)
            self._rush(may_grow)
        elif self._fresh:
            self._fresh = False  # what the change itself did
        elif self.wanted != self.good:
            self._looks.append(look)
            self._try()
        else:
            self._wait_looks -= 1
            self._looks = [*self._looks[1 - K_BASE_LOOKS :], look]
            self._tune(may_grow)

    def _use(self, number: int) -> None:
        self.wanted = number
        self._looks, self._fresh = [], True

    def _is_lossy(self, looks: Sequence[Look]) -> bool:
        return fmean(look.loss for look in looks) >= K_LOSS

    def _rush(self, may_grow: bool) -> None:
        *before, last = self._looks
        rising = not before or last.goodput_bps > K_RISING * before[-1].goodput_bps
        more = may_grow and self._is_lossy([last]) and self.wanted < self._most
        if more and (rising or last.full) and len(self._looks) < K_RUSH_LOOKS:
            return
        more = more and not last.full
        paid = self._before_bps is None or last.goodput_bps >= K_GAIN * self._before_bps
        if paid and more:
            self._before_bps = last.goodput_bps
            factor = K_STEP if self.wanted >= K_FINE_FROM else 4 if last.loss > K_LOSS_HIGH else 2
            self.good = self.wanted
            self._use(min(self._most, int(self.wanted * factor)))
            return
        self._before_bps = None
        if not paid:
            # After a long step the peak may well lie between.
            middle = round((self.good * self.wanted) ** 0.5)
            self._use(middle if self.wanted > 1.6 * self.good else self.good)
        elif self.wanted <= self._least:
            # Nothing has been tried yet: a link that begins to lose packets is rushed at then. Where a queue
            # keeps from that, it may be the link's, and it may be a busy machine's: that is tried.
            self._looks = self._looks[-K_BASE_LOOKS:]
            if len(self._looks) < K_BASE_LOOKS or not self._is_lossy(self._looks):
                return
        # A step that didn't pay by a look or two is looked at again, and longer.
        self._rushing, self.good, self._up, self._moved_up = False, self.wanted, not paid, None
        self._loss, self._wait_looks, self._pause_looks = last.loss, 0, K_PAUSE_LOOKS

    def _tune(self, may_grow: bool) -> None:
        if len(self._looks) < K_BASE_LOOKS // 2:
            return
        more = may_grow and self._is_lossy(self._looks) and self.wanted < self._most
        full = 2 * sum(look.full for look in self._looks) > len(self._looks)
        loss = fmean(look.loss for look in self._looks)
        if (
            more
            and not full
            and len(self._looks) == K_BASE_LOOKS
            and loss > K_OTHER_LOSS * max(K_LOSS, self._loss)
        ):
            self._rushing = True
            return
        if self._wait_looks > 0:
            return
        if not more if self._up else self.good <= self._least:
            self._up = not self._up
        step = K_STEP if self._unpaid % 4 < 2 else K_STEP_FINE
        if self._up and more:
            number = min(self._most, max(self.good + 1, int(self.good * step)))
        elif not self._up and self.good > self._least:
            number = max(self._least, min(self.good - 1, round(self.good / step)))
        else:
            return
        self._base = self._looks
        self._use(number)

    def _try(self) -> None:
        count, up = len(self._looks), self.wanted > self.good
        if count < K_CLEAR_LOOKS:
            return
        late = self._looks[count // 2 :]
        ratio = _mean_bps(late) / max(_mean_bps(self._base), 1.0)
        rising = _mean_bps(self._looks[-2:]) > K_RISING * self._looks[-3].goodput_bps
        clear = ratio > K_CLEARLY_BETTER or (ratio < K_CLEARLY_WORSE and not rising)
        if count < K_TRY_LOOKS and not clear:
            return
        self._loss = fmean(look.loss for look in self._base)
        if ratio >= (K_BETTER if up else K_AS_GOOD):
            back = self._moved_up is not None and self._moved_up != up
            self.good, self._moved_up = self.wanted, up
            self._looks, self._unpaid = list(late), 0
            if not back:
                self._wait_looks, self._pause_looks = 0, K_PAUSE_LOOKS
                return
        else:
            self._use(self.good)
            self._unpaid += 1
        self._up = not up
        self._wait_looks = self._pause_looks
        self._pause_looks = min(K_PAUSE_MOST_LOOKS, 2 * self._pause_looks)


def _mean_bps(looks: Sequence[Look]) -> float:
    return fmean(look.goodput_bps for look in looks)
