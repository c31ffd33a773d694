"""What a site's instances have to do together, kept up by each: a look asks none of hundreds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prfaas.simulator.engine import Engine


class Tally:
    """Of those that are up and not draining. Figures are by the instance's number; 0 for the others."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = engines
        self.backlogs = [0.0] * len(engines)
        """Seconds of prefill queued at each."""
        self.running, self.waiting = [0] * len(engines), [0] * len(engines)
        """Requests in each one's decode batch, and before it."""
        self.prefills = self.decodes = self.slots = 0
        """How many prefill, how many decode, and the latter's batch limits together."""
        self.stale = True
        """One of them has come up or gone down, drains, or has changed its role since the last count."""
        for number, engine in enumerate(engines):
            engine.tally = (self, number)

    def count(self) -> None:
        """Be right about who does what; the rest is told as it changes."""
        if not self.stale:
            return
        self.stale = False
        self.prefills = self.decodes = self.slots = 0
        for number, engine in enumerate(self._engines):
            able = engine.up and not engine.draining
            prefills, decodes = able and engine.role != "decode", able and engine.role != "prefill"
            self.backlogs[number] = engine.backlog_s if prefills else 0.0
            self.running[number] = engine.running if decodes else 0
            self.waiting[number] = engine.waiting if decodes else 0
            self.prefills += prefills
            self.decodes += decodes
            self.slots += engine.max_batch if decodes else 0
