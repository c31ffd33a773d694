"""Names of peers to addresses, looked up beside the loop: a name server that doesn't answer holds up nobody's
transfers.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

K_FRESH_S, K_FAILED_S = 30.0, 1.0
"""How long an answer, or a failure, serves before the name is asked about again."""
K_AT_ONCE = 16
"""Look-ups under way at most; who comes later waits."""
K_NAMES = 4096
Address = tuple[int, Any]
"""Family, and what a socket of it connects to."""


@dataclass(frozen=True, slots=True)
class _Answer:
    at_s: float
    found: Address | None
    error: OSError | None

    def is_fresh(self, now: float) -> bool:
        return now - self.at_s < (K_FRESH_S if self.found else K_FAILED_S)


class Resolver:
    """For one loop. Threads only put answers in; times are of the monotonic clock."""

    def __init__(self) -> None:
        self._answers: dict[tuple[str, int], _Answer] = {}
        self._asked: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def find(self, host: str, port: int, now: float) -> Address | None:
        """Where it is; None: it is being looked up, ask again soon. Raises OSError when nobody knows. An old
        answer serves while there is no newer one.
        """
        try:
            return _first(
                socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
            )
        except socket.gaierror:
            pass  # a name
        except UnicodeError:
            raise OSError(f"{host[:80]!r} can't be a name") from None
        key = (host, port)
        with self._lock:
            answer = self._answers.get(key)
            stale = answer is None or not answer.is_fresh(now)
            if stale and key not in self._asked and len(self._asked) < K_AT_ONCE:
                try:
                    threading.Thread(target=self._look_up, args=key, daemon=True, name="prfaas-names").start()
                    self._asked.add(key)
                except RuntimeError as error:  # there may be no more threads
                    if answer is None or answer.found is None:
                        raise OSError(f"{host}: {error}") from None
        if answer is None or (answer.found is None and not answer.is_fresh(now)):
            return None
        if answer.error is not None:
            raise answer.error
        return answer.found

    def _look_up(self, host: str, port: int) -> None:
        found, error = None, None
        try:
            found = _first(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as failed:
            error = failed
        with self._lock:
            before = self._answers.get((host, port))
            if error is not None and before is not None and before.found is not None:
                found, error = before.found, None  # better an old address than none
            self._answers.pop((host, port), None)  # the newest is last
            self._answers[host, port] = _Answer(time.monotonic(), found, error)
            if len(self._answers) > K_NAMES:
                del self._answers[next(iter(self._answers))]
            self._asked.discard((host, port))


def _first(found: Sequence[tuple[Any, ...]]) -> Address:
    return int(found[0][0]), found[0][4]
