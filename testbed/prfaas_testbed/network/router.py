"""The near end of the router's agent (agent.py): orders out, answers and samples in."""

from __future__ import annotations

import json
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prfaas.model.errors import MachineError, PrfaasError

K_ANSWER_S = 30.0
K_ASK_AGAIN_S = 0.2  # and twice as long each time: a line lost once made a change two seconds late
K_ASK_AGAIN_MOST_S = 2.0
K_LOOK_AFTER_S = 0.04  # a sample: taking one holds packets up for a millisecond or two
K_KEPT_SAMPLES = 40_000  # over an hour at ten a second


class RouterError(PrfaasError):
    """The router refused a command or died."""


@dataclass(frozen=True)
class LinkCounters:
    """Of one directed link since it was made."""

    bytes: int
    """Ethernet frames that left the link, at its far end."""
    packets: int
    losses: int
    """Packets that the link was told to lose."""
    queue_drops: int
    """Packets that found the queue full."""
    backlog_bytes: int
    """Bytes in the queue now."""
    held_packets: int
    """Packets in flight and in the queue."""


@dataclass(frozen=True)
class Sample:
    at_s: float
    """time.monotonic() of this machine."""
    links: dict[str, LinkCounters]
    lags_ms: tuple[float, ...]
    """How late probes left a netem of their own since the sample before: the emulator's timer lag."""
    accidents: dict[str, int]
    """Counters of drops that nobody planned, since the start."""
    waiting_bytes: int = 0
    """Memory of packets that waited for the emulator itself to take them, between the sample before and this
    one, if it can tell.
    """


class RouterAgent:
    """Calls are safe from several threads; each waits for its answer. Samples arrive by themselves once
    observed.
    """

    def __init__(self, write_fd: int, read_fd: int, waiting_bytes: Callable[[], int] = lambda: 0) -> None:
        self._waiting_bytes = waiting_bytes
        self._write_fd, self._read_fd = write_fd, read_fd
        self._answers: dict[int, dict[str, Any] | None] = {}
        self._changed = threading.Condition()
        self._next_id = 1
        self._offset_s, self._offset_error_s = 0.0, float("inf")
        self._look_s: float | None = None
        self._waiting_then_bytes = 0
        self._dead: str | None = None
        self._ready = False
        self.samples: deque[Sample] = deque(maxlen=K_KEPT_SAMPLES)
        self._thread = threading.Thread(target=self._read, name="router-agent", daemon=True)
        self._thread.start()

    def wait_ready(self, boot_s: float) -> None:
        """Until the agent has greeted. Raises MachineError if it doesn't within `boot_s`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ready or self._dead, timeout=boot_s):
                raise MachineError(f"the router did not start within {boot_s:.0f} s")
        if self._dead:
            raise MachineError(f"the router ended as it started: {self._dead}")
        for _ in range(8):
            self.order({"do": "clock"})

    def order(self, order: dict[str, Any], timeout_s: float = K_ANSWER_S) -> dict[str, Any]:
        """Send an order, wait for its answer, and ask for that again now and then: the appliance's line can
        lose bytes. Raises RouterError when it can't be had or its status isn't 0.
        """
        with self._changed:
            number, self._next_id = self._next_id, self._next_id + 1
            self._answers[number] = None
            # It ends the line before as well, whose end may be what was lost.
            line = f"\n{json.dumps({'id': number, **order})}\n".encode()
            sent_s = time.monotonic()
            left_s, patience_s = timeout_s, K_ASK_AGAIN_S
            while left_s > 0 and self._answers[number] is None and not self._dead:
                self._write(line)
                self._changed.wait_for(
                    lambda: self._answers[number] is not None or self._dead, timeout=min(left_s, patience_s)
                )
                patience_s = min(2 * patience_s, K_ASK_AGAIN_MOST_S)
                left_s = sent_s + timeout_s - time.monotonic()
            answer = self._answers.pop(number)
        if answer is None:
            raise RouterError(f"the router gave no answer to {order['do']!r}: {self._dead or 'too slow'}")
        if order["do"] == "clock":
            trip_s = answer["came_s"] - sent_s
            if trip_s / 2 <= self._offset_error_s:
                self._offset_s = (sent_s + answer["came_s"]) / 2 - answer["now_s"]
                self._offset_error_s = trip_s / 2
        if answer["rc"]:
            said = (answer.get("err") or answer.get("out") or "no reason given").strip().replace("\n", "; ")
            raise RouterError(
                f"the router refused {order.get('argv') or order.get('lines') or order['do']}: {said}"
            )
        return answer

    def _write(self, line: bytes) -> None:
        try:
            while line:
                line = line[os.write(self._write_fd, line) :]
        except OSError as error:
            raise RouterError(f"the router is gone: {error}") from None

    def run(self, node: str | None, argv: Sequence[str], lines: Sequence[str] = ()) -> str:
        """A command in a node's namespace, `lines` on its input; its output. Raises RouterError if it
        fails.
        """
        text = "".join(line + "\n" for line in lines)
        return str(self.order({"do": "run", "node": node, "argv": list(argv), "input": text})["out"])

    def change(self, node: str, lines: Sequence[str]) -> tuple[float, float]:
        """tc lines, by a tc that stands ready; when it began and ended, in our time.monotonic()."""
        answer = self.order({"do": "change", "node": node, "lines": list(lines)})
        return self.here_s(answer["began_s"]), self.here_s(answer["ended_s"])

    def prepare(self, nodes: Sequence[str]) -> None:
        """Have a tc stand ready in each node, so that changes start no process."""
        self.order({"do": "prepare", "nodes": list(nodes)})

    def here_s(self, there_s: float) -> float:
        """The router's monotonic time as ours."""
        return there_s + self._offset_s

    @property
    def clock_error_s(self) -> float:
        """At most this far is here_s from the truth."""
        return self._offset_error_s

    def stop(self) -> None:
        """Ask the agent to end; it may already be gone, or never have come."""
        if not self._ready:
            return
        try:
            self.order({"do": "stop"}, timeout_s=1.0)
        except RouterError:
            pass

    def close(self) -> None:
        os.close(self._write_fd)
        self._thread.join(timeout=2)
        os.close(self._read_fd)

    def _read(self) -> None:
        pending = b""
        reason = "its channel closed"
        while True:
            if self._look_s is not None:
                readable, _, _ = select.select(
                    [self._read_fd], [], [], max(0.0, self._look_s - time.monotonic())
                )
                if not readable:
                    self._waiting_then_bytes, self._look_s = self._waiting_bytes(), None
            try:
                data = os.read(self._read_fd, 65536)
            except OSError as error:
                data, reason = b"", str(error)
            came_s = time.monotonic()
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                self._take(line, came_s)
        with self._changed:
            self._dead = reason
            self._changed.notify_all()

    def _take(self, line: bytes, came_s: float) -> None:
        try:
            message = json.loads(line)
        except ValueError:  # a line of the guest's kernel before the agent had the terminal
            return
        if "sample" in message:
            self.samples.append(self._sample(message["sample"]))
            self._look_s = came_s + K_LOOK_AFTER_S
            return
        with self._changed:
            if "ready" in message:
                self._ready = True
            elif message.get("id") in self._answers:
                self._answers[message["id"]] = {**message, "came_s": came_s}
            self._changed.notify_all()

    def _sample(self, row: dict[str, Any]) -> Sample:
        links = {}
        for name, (total_bytes, packets, drops, queue_drops, backlog, held) in row["links"].items():
            # netem counts a packet that the bucket below it refused as its own drop too.
            losses = (drops - queue_drops) & 0xFFFFFFFF
            links[name] = LinkCounters(total_bytes, packets, losses, queue_drops, backlog, held)
        return Sample(
            at_s=self.here_s(row["at_s"]),
            links=links,
            lags_ms=tuple(lag / 1000 for lag in row["lags_us"]),
            accidents=row["accidents"],
            waiting_bytes=self._waiting_then_bytes,
        )
