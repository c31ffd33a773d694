"""A timeline whose run is over while a program of it is under way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prfaas.config.experiment import Hostile
from prfaas_testbed.experiment.timeline import Timeline

# Says more than a pipe holds: who hears of it at the FIFO knows that it is being read.
K_SENDS = """
import sys, time
print("x" * 200_000, flush=True)
open(sys.argv[1], "w").close()
time.sleep(60)
"""
K_PATIENCE_S = 20.0


class Sender(subprocess.Popen[str]):
    """In the place of what sends hostile packets: it takes its time."""

    def __init__(self, fifo: Path, **how: Any) -> None:
        self.readers: list[str] = []
        self.read = threading.Event()
        super().__init__([sys.executable, "-c", K_SENDS, str(fifo)], **how)

    def communicate(self, *arguments: Any, **more: Any) -> Any:
        self.readers.append(threading.current_thread().name)
        try:
            return super().communicate(*arguments, **more)
        finally:
            self.read.set()


def test_hostile_traffic_under_way_is_ended_when_abandoned_and_read_by_one_thread_alone(
    tmp_path: Path,
) -> None:
    """Two that read it close its pipes under each other: Ctrl-C would end in an error about those."""
    senders: list[Sender] = []
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def popen(argv: list[str], **how: Any) -> Sender:
        senders.append(Sender(fifo, **how))
        return senders[-1]

    site = SimpleNamespace(device="none", address="none", popen=popen)
    net = SimpleNamespace(sites={"a": site, "b": site}, prepare_changes=lambda links: None)
    event = Hostile(do="hostile", at_s=0.0, kind="reset", source="a", target="b")
    timeline = Timeline([event], net, SimpleNamespace())  # type: ignore[arg-type]
    timeline.prepare()
    timeline.start(time.monotonic())
    fifo.read_bytes()
    timeline.abandon()
    (sender,) = senders
    assert sender.returncode == -signal.SIGKILL
    assert sender.read.wait(K_PATIENCE_S)
    assert len(sender.readers) == 1
