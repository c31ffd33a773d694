"""Joining a node's pump: who we are, the leave to read our memory, and the pump's first answer."""

from __future__ import annotations

import ctypes
import secrets
import socket
import struct

import msgspec

from prfaas.config.pump import PumpConfig
from prfaas.model.errors import MachineError
from prfaas.pump_client import launch
from prfaas.pump_client import messages as m

K_PR_SET_PTRACER = 0x59616D61
K_ATTACH_S = 10.0


class Joining:
    """Joins one pump after another, always under the same name and token."""

    def __init__(self, config: PumpConfig, name: str, *, start: bool) -> None:
        self._config, self._name, self._may_start = config, name, start
        self._patience_s = launch.K_START_S
        self.token = secrets.token_bytes(16)
        self._probe = ctypes.create_string_buffer(secrets.token_bytes(16), 16)

    def join(self, guards_fd: int) -> tuple[socket.socket, m.Attached]:
        """A pump's connection, which doesn't block, and its answer. Raises MachineError."""
        try:
            sock = (
                launch.connect_or_start(self._config, patience_s=self._patience_s)
                if self._may_start
                else launch.connect(self._config.control_path)
            )
        except OSError as error:
            # A full disk, say, or no descriptor left: whoever joins again will have better luck later.
            raise MachineError(
                f"{self._config.control_path}: no pump can be reached or started: {error}"
            ) from None
        if sock is None:
            raise MachineError(f"no pump answers at {self._config.control_path}")
        try:
            answer = self._attach(sock, guards_fd)
        except OSError as error:
            sock.close()
            raise MachineError(f"the pump at {self._config.control_path} doesn't answer: {error}") from None
        if not isinstance(answer, m.Attached):
            sock.close()
            raise MachineError(answer.error if isinstance(answer, m.Refused) else "the pump answers nonsense")
        sock.setblocking(False)
        self._patience_s = 0.0  # whoever joins again has deadlines to keep meanwhile
        return sock, answer

    def _attach(self, sock: socket.socket, guards_fd: int) -> m.ToServer:
        """Say who we are; the answer. Raises OSError."""
        sock.settimeout(K_ATTACH_S)
        pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        # Under Yama's ptrace_scope 1 the pump may touch our memory only by our leave.
        ctypes.CDLL(None).prctl(K_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)
        hello = m.Attach(
            m.K_CONTROL_VERSION, self._name, self.token, ctypes.addressof(self._probe), self._probe.raw
        )
        data = m.encode(hello)
        sent = socket.send_fds(sock, [data], [guards_fd])
        sock.sendall(data[sent:])
        return _first_answer(sock)


def _first_answer(sock: socket.socket) -> m.ToServer:
    """The pump's first message. The pump says nothing more until it is asked, so nothing is left over."""
    inbox = m.Inbox()
    while True:
        data = sock.recv(65536)
        if not data:
            raise ConnectionError("it closed the connection")
        bodies = inbox.feed(data)
        if bodies:
            try:
                return m.decode_to_server(bodies[0])
            except msgspec.MsgspecError as error:
                raise ConnectionError(str(error)) from None
