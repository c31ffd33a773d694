"""Processes that the bench runs in a site, spoken to in JSON lines over their standard input and output.

The child keeps its real standard output for answers and points descriptor 1 at standard error, for native
libraries print to it. An answer is {"ok": value} or {"error": text}; one question is answered at a time.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Self

import psutil

from prfaas.model.errors import PrfaasError

K_END_S = 5.0  # how long a process may take to end by itself before it is killed
Handler = Callable[..., Any]
Spawn = Callable[..., subprocess.Popen[Any]]


class WorkerError(PrfaasError):
    """A process of the bench failed or went silent; the message carries the end of what it said."""


class Worker:
    """The parent's side of one process. Close it, or use it as a context."""

    def __init__(self, name: str, spawn: Spawn, module: str, log: Path, **env: str) -> None:
        """`spawn` starts a program where it belongs (a place's popen); `log` takes its standard error."""
        self.name, self._log = name, log
        argv = [sys.executable, "-m", "prfaas_testbed.bench.worker", module]
        with log.open("wb") as errors:
            self._process = spawn(
                argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def call(self, method: str, timeout_s: float = 60.0, **parameters: Any) -> Any:
        """What the process answers. Raises WorkerError when it fails, ends or isn't done in `timeout_s`."""
        self.send(method, **parameters)
        return self.receive(timeout_s)

    def call_beside(
        self, method: str, meanwhile: Callable[[], None] | None, timeout_s: float, **parameters: Any
    ) -> Any:
        """As `call`, with something to do here while the process is at it. Raises what that raises."""
        self.send(method, **parameters)
        try:
            if meanwhile is not None:
                meanwhile()
        finally:
            answer = self.receive(timeout_s)
        return answer

    def send(self, method: str, **parameters: Any) -> None:
        """Ask without waiting; `receive` takes the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"method": method, "parameters": parameters}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._said("ended")) from None

    def has_answered(self, wait_s: float) -> bool:
        """Whether there is an answer to take, or the process has ended, within so long."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], max(0.0, wait_s))
        return bool(readable)

    def receive(self, timeout_s: float = 60.0) -> Any:
        assert self._process.stdout is not None
        line = _read_line(self._process.stdout, timeout_s)
        if line is None:
            raise WorkerError(self._said(f"gave no answer within {timeout_s:g} s"))
        if not line:
            raise WorkerError(self._said("ended"))
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(self._said(f"failed: {answer['error']}"))
        return answer["ok"]

    def cpu_s(self) -> float:
        """Processor seconds that it and its children have used; 0 once it has ended."""
        return cpu_seconds(self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        end_process(self._process)
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _said(self, what: str) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        # Of a traceback what went wrong alone, where that isn't told already: the rest is in the log.
        last = lines[-1:] if any(line.startswith("Traceback ") for line in lines) else lines[-3:]
        if last and last[-1] in what:
            last = []
        return f"{self.name} {what}" + (f"; it said: {' / '.join(last)}" if last else "")


def cpu_seconds(pid: int) -> float:
    """Processor seconds of a process and all its living descendants; 0 for one that has ended."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    total = 0.0
    for one in family:
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def end_process(process: subprocess.Popen[Any]) -> None:
    """Wait for its end, then ask for it, then force it; by its own process group, which it leads."""
    for step in (None, signal.SIGTERM, signal.SIGKILL):
        if step is not None:
            try:
                os.killpg(process.pid, step)
            except ProcessLookupError:
                pass
        try:
            process.wait(K_END_S)
            return
        except subprocess.TimeoutExpired:
            continue


def _read_line(stream: IO[str], timeout_s: float) -> str | None:
    """One line, "" at the end of the stream, None when none came in time.

    The child writes a line whole and only when asked, so nothing is left in the buffer between calls.
    """
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        readable, _, _ = select.select([stream], [], [], left)
        if readable:
            return stream.readline()
    return None


def main() -> None:
    """The child's side: answer with a module's handlers until standard input ends."""
    # Before anything else is imported: libraries print as they load.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    handlers: Mapping[str, Handler] = importlib.import_module(sys.argv[1]).handlers()
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer: dict[str, Any] = {"ok": handlers[question["method"]](**question["parameters"])}
        except Exception as error:  # whatever it is, the parent is to hear of it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
    answers.close()
    # Threads of native libraries don't always end with the interpreter, and nothing is left to be flushed.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
