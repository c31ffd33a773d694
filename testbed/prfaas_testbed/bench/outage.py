"""A link that is cut in the middle of a transfer: the transfer goes on when it is back, and meanwhile the
receiver can take pages back at once, those with bytes under way as well.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from prfaas_testbed.bench import checks
from prfaas_testbed.bench.cell import Cell
from prfaas_testbed.bench.engines.prfaas import Prfaas
from prfaas_testbed.bench.harness import Progress, Row
from prfaas_testbed.bench.places import Emulated
from prfaas_testbed.bench.worker import WorkerError

K_SIZE_BYTES = 16_000_000
K_CUT_AT = 0.25  # of the bytes
K_TRIES = 3
K_LOOK_S = 0.01
K_BEGIN_S = 30.0
K_DONE_S = 60.0
K_FREE_S = 1.0  # for the receiver to have its pages back with the link down
K_SENT, K_CANARY = 7, 0xC5  # values of bytes
K_ROOM = 1_000_000  # beside those that the engine counts up from 1


@dataclass(frozen=True)
class Cut:
    """A transfer in the middle of which every link went down."""

    transfer: Future[Row]
    value: int
    """Of its bytes."""
    before: Row
    """The receiver's counters at its begin."""
    began_s: float
    """The cut, on time.perf_counter()."""

    def outlast(self, down_s: float) -> bool:
        """Wait until so long after the cut; whether the transfer was over by then."""
        time.sleep(max(0.0, self.began_s + down_s - time.perf_counter()))
        return self.transfer.done()


def measure(place: Emulated, cell: Cell, downs_s: Sequence[float], progress: Progress) -> list[Row]:
    """A row for each length of a cut: how long after its end the transfer was through, and what it cost.

    Raises WorkerError when a transfer fails.
    """
    rows, values = [], itertools.count(1)  # never what the pages hold from before
    with Prfaas() as engine, ThreadPoolExecutor(1) as threads:
        engine.start(place, cell.with_(total_bytes=K_SIZE_BYTES, contiguous=True))
        for down_s in downs_s:
            with _cut(place, engine, threads, down_s, values, progress) as cut:
                freed_s = _free(engine)
                over_in_time = cut.outlast(down_s)
            up_s = time.perf_counter()
            took = cut.transfer.result()
            after_s = time.perf_counter() - up_s
            _take(engine, cut.value)
            after = _inbound(engine)
            rows.append(
                {
                    "down_s": down_s,
                    "size_bytes": K_SIZE_BYTES,
                    "over_before_the_end": over_in_time,
                    "freed_s": freed_s,
                    "after_s": after_s,
                    "sender_s": took["ended_s"] - took["began_s"],
                    "streams_lost": after["streams_lost"] - cut.before["streams_lost"],
                    "payload_bytes": after["payload_bytes_received"] - cut.before["payload_bytes_received"],
                }
            )
            progress(
                f"link down for {down_s:g} s: pages back in {freed_s * 1e3:.1f} ms, the transfer "
                f"through {after_s:.2f} s after its end, {rows[-1]['streams_lost']} streams replaced"
            )
    return rows


def abandon(place: Emulated, cell: Cell, down_s: float, progress: Progress) -> Row:
    """The lease that a transfer is filling is ended while the link is down: how soon its pages are the
    receiver's own again, whether anything was written to them after that, when the link was back as well, and
    what the sender heard.

    Raises WorkerError when the transfer doesn't get under way, or succeeds.
    """
    with Prfaas() as engine, ThreadPoolExecutor(1) as threads:
        engine.start(place, cell.with_(total_bytes=K_SIZE_BYTES, contiguous=True))
        receiver = engine.ends["receiver"]
        with _cut(place, engine, threads, down_s, itertools.repeat(K_SENT), progress) as cut:
            receiver.call("revoke", room=K_ROOM)
            freed_s = time.perf_counter() - cut.began_s
            receiver.call("fill", value=K_CANARY)
            received_bytes = _received_bytes(engine, cut.before)
            over_in_time = cut.outlast(down_s)
        up_s = time.perf_counter()
        told = str(cut.transfer.exception(timeout=K_DONE_S) or "")
        told_s = time.perf_counter() - up_s
        if not told:
            raise WorkerError("a transfer to a lease that had ended succeeded")
        untouched = bool(receiver.call("holds", value=K_CANARY, size_bytes=K_SIZE_BYTES))
        # The same pages, under a lease of the next room.
        engine.deliver(K_SIZE_BYTES)
        again = bool(receiver.call("holds", value=K_SENT, size_bytes=K_SIZE_BYTES))
    row = {
        "down_s": down_s,
        "size_bytes": K_SIZE_BYTES,
        "received_bytes": received_bytes,
        "freed_s": freed_s,
        "over_before_the_end": over_in_time,
        "untouched": untouched,
        "told": told,
        "told_s": told_s,
        "used_again": again,
    }
    progress(
        f"lease ended with the link down and bytes under way: pages back in {freed_s * 1e3:.1f} ms, "
        f"{'untouched' if untouched else 'WRITTEN TO'}; the sender heard {told_s:.2f} s after its return"
    )
    return row


@contextmanager
def _cut(
    place: Emulated,
    engine: Prfaas,
    threads: ThreadPoolExecutor,
    down_s: float,
    values: Iterator[int],
    progress: Progress,
) -> Iterator[Cut]:
    """Every link down while the context lasts, from K_CUT_AT of a transfer on. Where all of it was there
    before, since on a busy machine the router may hear of a cut half a second late, another one is cut.

    Raises WorkerError when one doesn't get under way, or K_TRIES cuts came too late.
    """
    receiver, sender = engine.ends["receiver"], engine.ends["sender"]
    for value in itertools.islice(values, K_TRIES):
        before = _inbound(engine)
        sender.call("fill", value=value)
        grant = receiver.call("grant", room=K_ROOM)
        transfer = threads.submit(
            sender.call, "deliver", timeout_s=down_s + K_DONE_S, grant=grant,
            peer_base=engine.peer_base, size_bytes=K_SIZE_BYTES,
        )  # fmt: skip
        _wait_for(engine, before, transfer)
        place.set_down(True)
        try:
            if _received_bytes(engine, before) < K_SIZE_BYTES:
                yield Cut(transfer, value, before, time.perf_counter())
                return
        finally:
            place.set_down(False)
        transfer.result()
        _take(engine, value)
        progress("the transfer was through before its link was down: once more")
    raise WorkerError(f"{K_TRIES} times the transfer was over before the link could be cut")


def judge_abandoned(row: Row) -> list[Row]:
    return [
        checks.at_most("outage/abandoned/pages_back_s", row["freed_s"], K_FREE_S),
        checks.at_least("outage/abandoned/untouched", float(row["untouched"]), 1.0),
        checks.at_least("outage/abandoned/used_again", float(row["used_again"]), 1.0),
    ]


def judge(rows: Sequence[Row]) -> list[Row]:
    return [
        checks.at_most(f"outage/{row['down_s']:g}s/pages_back_s", row["freed_s"], K_FREE_S) for row in rows
    ]


def _inbound(engine: Prfaas) -> Row:
    found: Row = engine.ends["receiver"].call("stats")["inbound"]
    return found


def _received_bytes(engine: Prfaas, before: Row) -> int:
    return int(_inbound(engine)["payload_bytes_received"] - before["payload_bytes_received"])


def _wait_for(engine: Prfaas, before: Row, transfer: Future[Row]) -> None:
    """Until K_CUT_AT of it is there. Raises WorkerError where it failed or stood still."""
    give_up_s = time.monotonic() + K_BEGIN_S
    while _received_bytes(engine, before) < K_CUT_AT * K_SIZE_BYTES:
        if transfer.done():
            transfer.result()
        if time.monotonic() > give_up_s:
            raise WorkerError("the transfer stood still before the link could be cut")
        time.sleep(K_LOOK_S)


def _take(engine: Prfaas, value: int) -> None:
    """End the lease of a transfer that succeeded. Raises WorkerError unless the bytes are there."""
    receiver, step = engine.ends["receiver"], engine.layout.segment_bytes
    if receiver.call("arrived", room=K_ROOM, limit_s=K_DONE_S) is None:
        raise WorkerError("the sender has its success, and the receiver's lease isn't complete")
    landed_s = receiver.call(
        "landed",
        offsets=list(range(0, K_SIZE_BYTES - step, step)),
        segment_bytes=step,
        value=value,
        limit_s=1.0,
    )
    if landed_s is None:
        raise WorkerError("prfaas reported success, and bytes were missing")


def _free(engine: Prfaas) -> float:
    """How long it takes to end a lease on the very pages that the transfer goes to."""
    receiver = engine.ends["receiver"]
    receiver.call("grant", room=K_ROOM + 1)
    began_s = time.perf_counter()
    receiver.call("revoke", room=K_ROOM + 1)
    return time.perf_counter() - began_s
