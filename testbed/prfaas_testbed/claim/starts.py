"""How many of a sequence an online door could serve in time that decides at each start, and not sooner.

The clairvoyant bound knows what will come. This knows nothing of it: requests wait in one queue, and each
time an instance is free it is chosen who starts there. So what lies between the two is what the future is
worth, and what lies below this is what a policy loses by steps of many prompts, by the link and by what it
doesn't know of the instances. It is no bound: a cleverer choice may have more.

Instances are ideal: one prompt at a time, whole, in the profile's time; nothing is preempted.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from prfaas.planner import Job


@dataclass
class _Door:
    jobs: Sequence[Job]
    local: int
    far: int
    free_at_s: list[float]
    """By instance, the local ones first."""
    waiting: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    """Those that can't be in time any more: they start where nobody else waits."""
    in_time: int = 0

    def own_s(self, job: Job, instance: int) -> float:
        """From its start there to its first token."""
        return job.local_s if instance < self.local else job.prfaas_s + job.tail_s

    def busy_s(self, job: Job, instance: int) -> float:
        return job.local_s if instance < self.local else job.prfaas_s

    def work_s(self, job: Job) -> float:
        """Of all instances together, as one."""
        return 1 / (self.local / job.local_s + self.far / job.prfaas_s)

    def sort_out(self, now: float) -> None:
        """Who can't be in time any more."""
        still: list[int] = []
        for one in self.waiting:
            job = self.jobs[one]
            soonest_s = min(job.local_s, job.prfaas_s + job.tail_s)
            (still if now + soonest_s <= job.deadline_s else self.late).append(one)
        self.waiting = still

    def kept(self, now: float) -> list[int]:
        """The most that can be in time, with all instances as one (Moore and Hodgson): by deadline, and each
        time that one would be late the longest so far gives way.
        """
        ahead_s = sum(max(0.0, at_s - now) for at_s in self.free_at_s) / len(self.free_at_s)
        longest: list[tuple[float, int]] = []
        dropped: set[int] = set()
        order = sorted(self.waiting, key=lambda one: (self.jobs[one].deadline_s, one))
        for one in order:
            job = self.jobs[one]
            own_s, work_s = min(job.local_s, job.prfaas_s + job.tail_s), self.work_s(job)
            heapq.heappush(longest, (-work_s, one))
            ahead_s += work_s
            while longest and now + ahead_s - work_s + own_s > job.deadline_s:
                less_s, given_up = heapq.heappop(longest)
                ahead_s += less_s
                dropped.add(given_up)
                if given_up == one:
                    break
        return [one for one in order if one not in dropped]

    def start_one(self, idle: set[int], now: float) -> int | None:
        """The instance that begins something now; None: nothing is to begin."""
        self.sort_out(now)
        for one in self.kept(now) if self.waiting else ():
            job = self.jobs[one]
            for instance in sorted(idle, reverse=True):
                if now + self.own_s(job, instance) <= job.deadline_s:
                    self.waiting.remove(one)
                    self.in_time += 1
                    self.free_at_s[instance] = now + self.busy_s(job, instance)
                    return instance
        if self.late and not self.waiting:
            instance = max(idle)
            self.free_at_s[instance] = now + self.busy_s(self.jobs[self.late.pop(0)], instance)
            return instance
        return None


def at_each_start(jobs: Sequence[Job], local_instances: int, prfaas_instances: int) -> float:
    """Share of `jobs` with their first token in time. Raises ValueError for none, and without instances."""
    count = local_instances + prfaas_instances
    if not jobs or not count:
        raise ValueError(f"{len(jobs)} requests, {count} instances: nothing to play")
    door = _Door(jobs, local_instances, prfaas_instances, [0.0] * count)
    idle = set(range(count))
    # (when, instance that is free or -1, job that comes or -1)
    events = [(job.arrival_s, -1, place) for place, job in enumerate(jobs)]
    heapq.heapify(events)
    while events:
        now = events[0][0]
        while events and events[0][0] <= now:
            _, instance, one = heapq.heappop(events)
            if instance < 0:
                door.waiting.append(one)
            else:
                idle.add(instance)
        while idle and (begun := door.start_one(idle, now)) is not None:
            idle.discard(begun)
            heapq.heappush(events, (door.free_at_s[begun], begun, -1))
    return door.in_time / len(jobs)
