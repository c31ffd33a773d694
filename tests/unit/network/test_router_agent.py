"""The router's near and far end over a line that loses bytes."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prfaas_testbed.network import router
from prfaas_testbed.network.agent import Agent
from prfaas_testbed.network.router import RouterAgent, RouterError

Line = Callable[[int, bytes], bytes]
"""What of the nth line that isn't empty arrives."""


def whole(n: int, line: bytes) -> bytes:
    return line


def carry(source: int, sink: int, line_of: Line) -> None:
    with os.fdopen(source, "rb") as lines, os.fdopen(sink, "wb", buffering=0) as out:
        n = 0
        for line in lines:
            try:
                out.write(line_of(n, line) if line.strip() else line)
            except BrokenPipeError:
                return  # that end is over; what was asked again of it meanwhile is for nobody
            n += bool(line.strip())


@contextmanager
def ends(orders: Line = whole, answers: Line = whole) -> Iterator[RouterAgent]:
    """Both ends with a carrier of lines each way between them."""
    there_in, order_out = os.pipe()
    order_in, here_out = os.pipe()
    here_in, answer_out = os.pipe()
    answer_in, there_out = os.pipe()
    far = Agent(there_in, there_out)

    def serve() -> None:
        far.loop()
        os.close(there_in)
        os.close(there_out)
        os.close(far.namespaces.home)

    threads = [
        threading.Thread(target=serve),
        threading.Thread(target=carry, args=(order_in, order_out, orders)),
        threading.Thread(target=carry, args=(answer_in, answer_out, answers)),
    ]
    for thread in threads:
        thread.start()
    near = RouterAgent(here_out, here_in)
    try:
        near.wait_ready(20)
        yield near
    finally:
        near.stop()
        near.close()
        for thread in threads:
            thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "K_ASK_AGAIN_S", 0.2)


def count_up(near: RouterAgent, path: Path) -> int:
    return int(near.run(None, ["sh", "-c", f"echo >> {path}; wc -l < {path}"]))


@pytest.mark.parametrize("damage", ["gone", "byte", "end"])
@pytest.mark.parametrize("way", ["orders", "answers"])
def test_an_order_is_done_once_however_its_line_loses_bytes(tmp_path: Path, way: str, damage: str) -> None:
    def line_of(n: int, line: bytes) -> bytes:
        if n % 2 == 0:
            return line
        return {"gone": b"", "byte": line[:3] + line[4:], "end": line[:-1]}[damage]

    lossy = {way: line_of}
    with ends(**lossy) as near:
        assert [count_up(near, tmp_path / "count") for _ in range(4)] == [1, 2, 3, 4]


def test_a_line_that_stays_silent_is_an_error_within_its_time() -> None:
    answers_end = threading.Event()

    def line_of(n: int, line: bytes) -> bytes:
        return b"" if answers_end.is_set() else line

    with ends(answers=line_of) as near:
        answers_end.set()
        with pytest.raises(RouterError, match="no answer to 'clock'"):
            near.order({"do": "clock"}, timeout_s=0.5)
        answers_end.clear()
        near.order({"do": "clock"})


def test_what_waits_is_looked_at_between_samples_and_not_while_one_holds_packets_up() -> None:
    """As when a sample is taken, more waits: that's the sample's doing."""
    sampling = threading.Event()
    out, order_end = os.pipe()
    here_in, answers = os.pipe()
    near = RouterAgent(order_end, here_in, lambda: 150_000 if sampling.is_set() else 4_000)
    line = b'{"sample":{"at_s":1.0,"links":{},"lags_us":[],"accidents":{}}}\n'
    try:
        for count in (1, 2):
            sampling.set()
            os.write(answers, line)
            give_up_s = time.monotonic() + 10
            while len(near.samples) < count and time.monotonic() < give_up_s:
                time.sleep(0.001)
            sampling.clear()
            time.sleep(10 * router.K_LOOK_AFTER_S)
        assert [sample.waiting_bytes for sample in near.samples] == [0, 4_000]
    finally:
        os.close(answers)
        near.close()
        os.close(out)
