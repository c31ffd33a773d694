"""Single servers: what a fleet can start, await, kill and stop, whichever kind they are."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from prfaas.model.errors import PrfaasError
from prfaas_testbed.instances.sglang_server import SglangServer, end_tree

if TYPE_CHECKING:
    from prfaas_testbed.network import Site

K_READY_S = 60.0  # imports take seconds, and many times that beside busy neighbours

Progress = Callable[[str], None]


class Process(Protocol):
    """A server that can be started, awaited, killed and stopped."""

    def start(self) -> None: ...
    def wait_ready(self, progress: Progress) -> None: ...
    def check_alive(self) -> None: ...
    def kill(self) -> None: ...
    def stop(self) -> None: ...
    @property
    def pid(self) -> int | None: ...


@dataclass
class Server:
    """One running instance as the load and the timeline know it."""

    name: str
    site: str
    role: str
    host: str
    port: int
    process: Process
    bootstrap_port: int | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


class Program:
    """A Python module of ours inside a site: ready when it says so on its output."""

    def __init__(
        self,
        name: str,
        site: Site,
        module: str,
        config: Path,
        log: Path,
        ready: str | None,
        words: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment`: on top of our own."""
        self.name, self._site, self._words = name, site, [module, *words, "--config", str(config)]
        self.log, self._ready, self._environment = log, ready, dict(environment or {})
        self._process: subprocess.Popen[Any] | None = None
        self._out: IO[bytes] | None = None
        self._from = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._close()
        self._out = self.log.open("ab")
        # What a process before this one said, in this run or in an interrupted one, isn't this one's word.
        self._from = self._out.tell()
        self._process = self._site.popen(
            [sys.executable, "-m", *self._words],
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self._environment},
            stdout=self._out,
            stderr=subprocess.STDOUT,
        )

    def wait_ready(self, progress: Progress) -> None:
        end_s = time.monotonic() + K_READY_S
        while self._ready is not None and self._ready not in self._text():
            self.check_alive()
            if time.monotonic() > end_s:
                raise PrfaasError(f"{self.name} isn't ready after {K_READY_S:g} s; log: {self.log}")
            time.sleep(0.05)

    def check_alive(self) -> None:
        if self._process is None or self._process.poll() is not None:
            status = self._process.returncode if self._process else None
            lines = self._text().strip().splitlines()
            raise PrfaasError(
                f"{self.name} ended with {status}: {lines[-1] if lines else 'no output'}; log: {self.log}"
            )

    def kill(self) -> None:
        if self._process is not None:
            end_tree(self._process, grace_s=0.0)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            end_tree(self._process)
        self._close()

    def _close(self) -> None:
        if self._out is not None:
            self._out.close()
            self._out = None

    def _text(self) -> str:
        with suppress(FileNotFoundError):
            return self.log.read_bytes()[self._from :].decode(errors="replace")
        return ""


class Real:
    """A real SGLang server with the same face."""

    def __init__(self, server: SglangServer) -> None:
        self._server = server

    @property
    def pid(self) -> int | None:
        return self._server.pid

    def start(self) -> None:
        self._server.start()

    def wait_ready(self, progress: Progress) -> None:
        self._server.wait_ready(progress=progress)

    def check_alive(self) -> None:
        self._server.check_alive()

    def kill(self) -> None:
        self._server.kill()

    def stop(self) -> None:
        self._server.stop()
