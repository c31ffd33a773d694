"""A link that is cut in the middle of a transfer: the transfer goes on when it is back, and meanwhile the
receiver can take pages back at once, those with bytes under way as well.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

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


def measure(place: Emulated, cell: Cell, downs_s: Sequence[float], progress: Progress) -> list[Row]:
    """A row for each length of a cut: how long after its end the transfer was through, and what it cost.

    Raises WorkerError when a transfer fails.
    """
    rows, values = [], itertools.count(1)
    with Prfaas() as engine, ThreadPoolExecutor(1) as threads:
        engine.start(place, cell.with_(total_bytes=K_SIZE_BYTES, contiguous=True))
        for down_s in downs_s:
            for _ in range(K_TRIES):
                if row := _cut(place, engine, threads, down_s, next(values)):
                    break
                progress("the transfer was through before its link was down: once more")
            else:
                raise WorkerError(f"{K_TRIES} times the transfer was over before the link could be cut")
            rows.append(row)
            progress(
                f"link down for {down_s:g} s: pages back in {row['freed_s'] * 1e3:.1f} ms, the transfer "
                f"through {row['after_s']:.2f} s after its end, {row['streams_lost']} streams replaced"
            )
    return rows


def _cut(
    place: Emulated, engine: Prfaas, threads: ThreadPoolExecutor, down_s: float, value: int
) -> Row | None:
    """None if the link was down too late: on a busy machine the router may hear of it half a second after."""
    receiver, sender = engine.ends["receiver"], engine.ends["sender"]
    before = _inbound(engine)
    sender.call("fill", value=value)  # never what the pages hold from before
    grant = receiver.call("grant", room=K_ROOM)
    transfer = threads.submit(
        sender.call, "deliver", timeout_s=down_s + K_DONE_S, grant=grant,
        peer_base=engine.peer_base, size_bytes=K_SIZE_BYTES,
    )  # fmt: skip
    _wait_for(engine, before["payload_bytes_received"] + K_CUT_AT * K_SIZE_BYTES, transfer)
    place.set_down(True)
    try:
        began_s = time.perf_counter()
        too_late = transfer.done()
        freed_s = _free(engine)
        if not too_late:
            time.sleep(max(0.0, began_s + down_s - time.perf_counter()))
        over_in_time = transfer.done()
    finally:
        place.set_down(False)
    up_s = time.perf_counter()
    took = transfer.result()
    after_s = time.perf_counter() - up_s
    if receiver.call("arrived", room=K_ROOM, limit_s=K_DONE_S) is None:
        raise WorkerError("the sender has its success, and the receiver's lease isn't complete")
    after = _inbound(engine)
    _check(engine, value)
    if too_late:
        return None
    return {
        "down_s": down_s,
        "size_bytes": K_SIZE_BYTES,
        "over_before_the_end": over_in_time,
        "freed_s": freed_s,
        "after_s": after_s,
        "sender_s": took["ended_s"] - took["began_s"],
        "streams_lost": after["streams_lost"] - before["streams_lost"],
        "payload_bytes": after["payload_bytes_received"] - before["payload_bytes_received"],
    }


def abandon(place: Emulated, cell: Cell, down_s: float, progress: Progress) -> Row:
    """The lease that a transfer is filling is ended while the link is down: how soon its pages are the
    receiver's own again, whether anything was written to them after that, when the link was back as well, and
    what the sender heard.

    Raises WorkerError when the transfer doesn't get under way, or succeeds.
    """
    with Prfaas() as engine, ThreadPoolExecutor(1) as threads:
        engine.start(place, cell.with_(total_bytes=K_SIZE_BYTES, contiguous=True))
        receiver, sender = engine.ends["receiver"], engine.ends["sender"]
        before = _inbound(engine)
        sender.call("fill", value=K_SENT)
        grant = receiver.call("grant", room=K_ROOM)
        transfer = threads.submit(
            sender.call, "deliver", timeout_s=down_s + K_DONE_S, grant=grant,
            peer_base=engine.peer_base, size_bytes=K_SIZE_BYTES,
        )  # fmt: skip
        _wait_for(engine, before["payload_bytes_received"] + K_CUT_AT * K_SIZE_BYTES, transfer)
        place.set_down(True)
        try:
            began_s = time.perf_counter()
            receiver.call("revoke", room=K_ROOM)
            freed_s = time.perf_counter() - began_s
            receiver.call("fill", value=K_CANARY)
            received_bytes = _inbound(engine)["payload_bytes_received"] - before["payload_bytes_received"]
            time.sleep(max(0.0, began_s + down_s - time.perf_counter()))
            over_in_time = transfer.done()
        finally:
            place.set_down(False)
        up_s = time.perf_counter()
        told = str(transfer.exception(timeout=K_DONE_S) or "")
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


def _check(engine: Prfaas, value: int) -> None:
    """Raises WorkerError unless the bytes are where the success says they are."""
    step = engine.layout.segment_bytes
    landed_s = engine.ends["receiver"].call(
        "landed",
        offsets=list(range(0, K_SIZE_BYTES - step, step)),
        segment_bytes=step,
        value=value,
        limit_s=1.0,
    )
    if landed_s is None:
        raise WorkerError("prfaas reported success, and bytes were missing")


def _wait_for(engine: Prfaas, received_bytes: float, transfer: Future[Row]) -> None:
    give_up_s = time.monotonic() + K_BEGIN_S
    while _inbound(engine)["payload_bytes_received"] < received_bytes:
        if transfer.done() or time.monotonic() > give_up_s:
            raise WorkerError("the transfer was over, or stood still, before the link could be cut")
        time.sleep(K_LOOK_S)


def _free(engine: Prfaas) -> float:
    """How long it takes to end a lease on the very pages that the transfer goes to."""
    receiver = engine.ends["receiver"]
    receiver.call("grant", room=K_ROOM + 1)
    began_s = time.perf_counter()
    receiver.call("revoke", room=K_ROOM + 1)
    return time.perf_counter() - began_s
