"""One end of a prfaas transfer: what a server's process is, a pump's client beside its pump."""

from __future__ import annotations

import queue
import time
from pathlib import Path
from typing import Any

import numpy as np

from prfaas.config.loading import load
from prfaas.config.pump import PumpConfig
from prfaas.model.decisions import Verdict
from prfaas.model.transfer import LeaseGrant, Outcome, TransferKind
from prfaas.pump_client import Lease, LocalPumpClient, Offer, Transfer
from prfaas_testbed.bench.engines.pool_worker import Pool, common_handlers
from prfaas_testbed.bench.worker import Handler

K_DEADLINE_S = 300.0
K_DEPTH = 8
"""Batches under way, so that there is always more to send. At 150 ms and 1% loss a lost packet holds up 14 MB
on its stream, and with three batches of 6 the link ran out of work for half a second in two."""


class End:
    """A client of the pump that serves this end, and one registered pool."""

    pool: Pool
    client: LocalPumpClient

    def __init__(self) -> None:
        self._leases: dict[int, tuple[Lease, list[float]]] = {}

    def start(self, config: str, pool_bytes: int) -> dict[str, Any]:
        """Join the running pump (none is started: the bench does that, to count its processor time)."""
        self.client = LocalPumpClient.open(load(Path(config), PumpConfig), name="bench", start=False)
        self.pool = Pool(pool_bytes)
        self.client.register([(self.pool.base, pool_bytes)])
        return {"base": self.pool.base, "address": self.client.address, "pump_pid": self.client.pump_pid}

    def prepare(self, address: str) -> None:
        self.client.prepare(address)

    def grant(self, room: int) -> str:
        """A lease on the whole pool."""
        lease = self.client.grant_lease(room, 1, [(self.pool.base, self.pool.size_bytes)], K_DEADLINE_S)
        arrived_s: list[float] = []

        def note(changed: Lease) -> None:
            if changed.complete and not arrived_s:
                arrived_s.append(time.perf_counter())

        lease.add_callback(note)
        self._leases[room] = (lease, arrived_s)
        return lease.grant.to_text()

    def arrived(self, room: int, limit_s: float) -> float | None:
        """When the lease was whole, on CLOCK_MONOTONIC; None if it isn't within `limit_s`. Ends the lease."""
        lease, arrived_s = self._leases.pop(room)
        lease.wait(limit_s)
        while lease.complete and not arrived_s:
            time.sleep(0.001)  # the callback follows the wake-up
        lease.revoke()
        return arrived_s[0] if arrived_s else None

    def revoke(self, room: int) -> None:
        lease, _ = self._leases.pop(room)
        lease.revoke()

    def move(
        self,
        grant: str,
        peer_base: int,
        offsets: list[int],
        segment_bytes: int,
        batch_segments: int,
        total_bytes: int,
        limit_s: float,
        peer_offsets: list[int] | None = None,
    ) -> dict[str, Any]:
        """Batches, K_DEPTH of them under way at a time, until the bytes are sent or no new one may begin."""
        places = np.array(offsets, dtype=np.uint64)
        peer_places = places if peer_offsets is None else np.array(peer_offsets, dtype=np.uint64)
        cuts = [slice(at, at + batch_segments) for at in range(0, len(places), batch_segments)]
        to = LeaseGrant.from_text(grant)
        ended: queue.SimpleQueue[tuple[float, Outcome | None]] = queue.SimpleQueue()
        calls_s: list[float] = []
        sent = moved = resent = under_way = number = 0
        used, began_s = time.process_time(), time.perf_counter()
        ended_s = began_s
        while True:
            while under_way < K_DEPTH and sent < total_bytes and time.perf_counter() - began_s < limit_s:
                cut = cuts[number % len(cuts)]
                batch = places[cut]
                called_s = time.perf_counter()
                transfer = self.client.submit(
                    to,
                    batch + np.uint64(self.pool.base),
                    peer_places[cut] + np.uint64(peer_base),
                    np.full(len(batch), segment_bytes, dtype=np.uint64),
                    kind=TransferKind.KV,
                    deadline_s=K_DEADLINE_S,
                )
                calls_s.append(time.perf_counter() - called_s)
                transfer.add_done_callback(lambda done: ended.put((time.perf_counter(), done.outcome)))
                sent += len(batch) * segment_bytes
                under_way += 1
                number += 1
            if not under_way:
                break
            at_s, outcome = ended.get(timeout=K_DEADLINE_S)
            assert outcome is not None
            if not outcome.ok:
                raise RuntimeError(f"a transfer ended as {outcome.reason}: {outcome.detail}")
            under_way -= 1
            moved += outcome.payload_bytes
            resent += outcome.resent_blocks
            ended_s = max(ended_s, at_s)
        return {
            "bytes": moved,
            "began_s": began_s,
            "ended_s": ended_s,
            "cpu_s": time.process_time() - used,
            "calls_s": calls_s,
            "resent_blocks": resent,
        }

    def deliver(self, grant: str, peer_base: int, size_bytes: int) -> dict[str, Any]:
        """One transfer of contiguous bytes: when it was handed over and when its success was known here."""
        ended: queue.SimpleQueue[tuple[float, Outcome | None]] = queue.SimpleQueue()
        began_s = time.perf_counter()
        transfer = self.client.submit(
            LeaseGrant.from_text(grant),
            [self.pool.base],
            [peer_base],
            [size_bytes],
            kind=TransferKind.KV,
            deadline_s=K_DEADLINE_S,
            last=True,
        )
        transfer.add_done_callback(lambda done: ended.put((time.perf_counter(), done.outcome)))
        ended_s, outcome = ended.get(timeout=K_DEADLINE_S)
        if outcome is None or not outcome.ok:
            raise RuntimeError(f"the transfer ended as {outcome}")
        return {"began_s": began_s, "ended_s": ended_s}

    def ask_and_send(
        self, grant: str, peer_base: int, orders: list[tuple[int, float]], depth: int
    ) -> list[dict[str, Any]]:
        """Transfers of (bytes, deadline_s), each sent once the link's ledger has admitted it, `depth` of them
        asked for at a time; how each went. Times are on CLOCK_MONOTONIC.
        """
        to = LeaseGrant.from_text(grant)
        news: queue.SimpleQueue[tuple[dict[str, Any], Offer | Transfer]] = queue.SimpleQueue()
        rows: list[dict[str, Any]] = []
        waiting, open_rows = list(orders), 0
        while waiting or open_rows:
            while waiting and open_rows < depth:
                size_bytes, deadline_s = waiting.pop(0)
                asked: dict[str, Any] = {"size_bytes": size_bytes, "deadline_s": deadline_s}
                asked.update(number=len(rows), asked_s=time.perf_counter())
                rows.append(asked)
                open_rows += 1
                offer = self.client.offer(to.site, size_bytes, deadline_s)
                offer.add_callback(lambda told, row=asked: news.put((row, told)))  # type: ignore[misc]
            row, what = news.get(timeout=K_DEADLINE_S)
            if isinstance(what, Transfer):
                outcome = what.outcome
                assert outcome is not None
                row.update(ok=outcome.ok, reason=outcome.reason and outcome.reason.value)
                row["ended_s"] = time.perf_counter()
                open_rows -= 1
            elif what.late:
                row["late"] = True
            elif what.verdict is Verdict.REFUSED:
                row["refused"] = what.reason and what.reason.value
                open_rows -= 1
            elif what.verdict is Verdict.ADMITTED and "admitted_s" not in row:
                row.update(admitted_s=time.perf_counter(), alone=what.alone)
                size = row["size_bytes"]
                transfer = self.client.submit(
                    to, [self.pool.base], [peer_base], [size], kind=TransferKind.KV,
                    deadline_s=K_DEADLINE_S, last=True, source=str(row["number"]), offer=what,
                )  # fmt: skip
                transfer.add_done_callback(lambda done, row=row: news.put((row, done)))  # type: ignore[misc]
        return rows

    def stats(self) -> dict[str, Any]:
        return self.client.stats()


def handlers() -> dict[str, Handler]:
    end = End()
    return {
        **common_handlers(lambda: end.pool),
        "start": end.start,
        "prepare": end.prepare,
        "grant": end.grant,
        "arrived": end.arrived,
        "revoke": end.revoke,
        "move": end.move,
        "deliver": end.deliver,
        "ask_and_send": end.ask_and_send,
        "stats": end.stats,
    }
