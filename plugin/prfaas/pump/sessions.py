"""The pumps that stream to this one, each known by its site and the boot id that it shows, and how many a
site may have. Free of clocks and sockets.

A pump that was started again shows another boot id, and what is left of the one before takes its place until
it is found dead. So a pump more than a site may have isn't refused: the one that has been silent for longest
goes, of those that no transfer is under way of. If it lives, it dials again when it has something to send.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Generic, Protocol, TypeVar

from prfaas.model.errors import RemoteProtocolError

K_STREAMS_PER_PUMP = 512
K_PUMPS_PER_SITE = 256
"""One a node; more than a site has that prefills for one other."""
K_STREAMS_PER_SITE = 4096
"""Of all its pumps together: each stream that has carried a block holds some MiB."""

Session = tuple[str, bytes]
"""Site, and boot id. A site that shows another one's boot id gets no hold of its transfers."""


class Heard(Protocol):
    heard_s: float
    """When its peer last sent anything."""


Stream = TypeVar("Stream", bound=Heard)


class Sessions(Generic[Stream]):
    """Streams by the pump that opened them."""

    def __init__(self) -> None:
        self._streams: dict[Session, list[Stream]] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def of(self, session: object) -> list[Stream]:
        return self._streams.get(session, [])  # type: ignore[call-overload, no-any-return]

    def join(self, session: Session, stream: Stream, busy: Collection[object]) -> list[Stream]:
        """A pump opened a stream; those that make room for it, which their owner has to end. `busy`: sessions
        that go on whatever comes. Raises RemoteProtocolError where nobody can make room.
        """
        if len(self.of(session)) >= K_STREAMS_PER_PUMP:
            raise RemoteProtocolError(f"more than {K_STREAMS_PER_PUMP} streams of one pump")
        site = session[0]
        others = {key: streams for key, streams in self._streams.items() if key[0] == site and key != session}
        n_streams = len(self.of(session)) + sum(map(len, others.values()))
        idle = sorted(
            (max(one.heard_s for one in streams), key) for key, streams in others.items() if key not in busy
        )
        given_up: list[Stream] = []
        for _, key in idle:
            if len(others) < K_PUMPS_PER_SITE and n_streams < K_STREAMS_PER_SITE:
                break
            given_up += others.pop(key)
            n_streams -= len(self._streams[key])
        if len(others) >= K_PUMPS_PER_SITE:
            raise RemoteProtocolError(f"more than {K_PUMPS_PER_SITE} pumps of one site at work")
        if n_streams >= K_STREAMS_PER_SITE:
            raise RemoteProtocolError(f"more than {K_STREAMS_PER_SITE} streams of one site")
        self._streams.setdefault(session, []).append(stream)
        return given_up

    def leave(self, session: object, stream: Stream) -> None:
        """A stream has ended; one that isn't among its session's is ignored."""
        same = self.of(session)
        if stream in same:
            same.remove(stream)
            if not same:
                del self._streams[session]  # type: ignore[arg-type]

    def clear(self) -> None:
        self._streams.clear()
