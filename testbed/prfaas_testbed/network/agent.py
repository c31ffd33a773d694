"""The router's own hand: one process inside the router that runs commands, counts, and measures its timers.

It is started as a script, with Python's standard library alone: in the appliance by the guest's init,
natively in the router's network namespace. It speaks lines of JSON over two descriptors.

In:  {"id", "do": "run", "node", "argv", "input"}  a command in a node's namespace (null: the router's own)
     {"id", "do": "change", "node", "lines"}       lines for the tc that stands ready in that node
     {"id", "do": "prepare", "nodes"}              have it stand there: to start a process holds up packets
     {"id", "do": "observe", "links", "edges", "every_s"}  start counting; links: {id: [node, device]}, edges
                                                   (devices towards sites): {site: [node, device]}
     {"id", "do": "clock"}
     {"id", "do": "stop"}                          and the guest, if this is one, powers off
     An order whose id was answered before isn't done again: its answer is only repeated, since a guest's
     line can lose bytes. A line that can't be read is left out for the same reason.
Out: {"id", "rc", "out", "err", "began_s", "ended_s"}
     {"sample": {...}}                             every every_s: see Observer.sample
Times are the router's CLOCK_MONOTONIC.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

K_CLONE_NEWNET, K_POWER_OFF = 0x40000000, 0x4321FEDC
K_TCA_STATS2, K_STATS_BASIC, K_STATS_QUEUE = 7, 1, 3
K_RTM_GETQDISC, K_RTM_NEWQDISC, K_NLMSG_DONE, K_NLMSG_ERROR = 38, 36, 3, 2
K_PROBE_ETHERTYPE = 0x88B5  # for local experiments
K_PROBE_BYTES_PER_S, K_PROBES_AHEAD_NS = 2000, 1_000_000_000
# Three times as many held packets up for 3 ms ten times a second, at full rate: more than was looked for.
K_PROBE_LEAST_BYTES, K_PROBE_LENGTHS = 60, 121  # due 30 to 90 ms after the one before
K_SO_TIMESTAMPING = 37
# SOF_TIMESTAMPING_TX_SCHED, RX_SOFTWARE. SO_TIMESTAMPNS gives what arrives unstamped its reading's time.
K_STAMP_AT_QUEUE, K_STAMP_ARRIVAL = 1 << 8 | 1 << 4, 1 << 3 | 1 << 4
K_KEPT_ANSWERS, K_CHANGE_S = 32, 20.0
K_NOISE = re.compile(r"Command failed|Warning|Object \"end-of-change-|\s*$")

Counters = tuple[int, int, int, int, int]  # bytes, packets, drops, backlog bytes, queued packets
K_NOTHING: Counters = (0, 0, 0, 0, 0)

libc = ctypes.CDLL(None, use_errno=True)


def setns(fd: int) -> None:
    if libc.setns(fd, K_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class Namespaces:
    """Open descriptors of the nodes' namespaces, and a way to be in one for a moment."""

    def __init__(self) -> None:
        self.home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self.fds: dict[str, int] = {}

    def within(self, node: str | None, action: Callable[[], Any]) -> Any:
        if node is None:
            return action()
        if node not in self.fds:
            self.fds[node] = os.open(f"/run/netns/{node}", os.O_RDONLY | os.O_CLOEXEC)
        setns(self.fds[node])
        try:
            return action()
        finally:
            setns(self.home)


class StandingTc:
    """A tc that stays and does lines as they come. To start or end a process for a change would hold up the
    packets of all links, and the probes that watch for it.
    """

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            ["tc", "-force", "-batch", "-"], stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe
        )
        self.number, self.gone = 0, False

    def do(self, lines: list[str]) -> str:
        """What it says against them; empty: done."""
        self.number += 1
        # It says nothing of what succeeds, and complains of this at once when it is through with the others.
        end = f"end-of-change-{self.number}"
        assert self.process.stdin
        assert self.process.stderr
        said, fd = "", self.process.stderr.fileno()
        try:
            self.process.stdin.write("".join(line + "\n" for line in [*lines, end]).encode())
            self.process.stdin.flush()
            while end not in said:
                if not select.select([fd], [], [], K_CHANGE_S)[0]:
                    raise OSError(f"tc did not end within {K_CHANGE_S:g} s")
                data = os.read(fd, 65536)
                if not data:
                    raise OSError("tc ended")
                said += data.decode(errors="replace")
        except OSError as error:
            self.gone = True
            self.process.kill()
            self.process.communicate()
            return f"{said}{error}"
        heard = [line for line in said.partition(f'"{end}"')[0].splitlines()[:-1] if not K_NOISE.match(line)]
        return "\n".join(heard)


def done(rc: int, out: str, err: str, began_s: float) -> dict[str, Any]:
    return {"rc": rc, "out": out, "err": err, "began_s": began_s, "ended_s": time.monotonic()}


class Commands:
    def __init__(self, namespaces: Namespaces) -> None:
        self.namespaces = namespaces
        self.standing: dict[str, StandingTc] = {}  # by node

    def run(self, node: str | None, argv: list[str], text: str | None) -> dict[str, Any]:
        def start() -> subprocess.Popen[str]:
            pipe = subprocess.PIPE
            return subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

        process = self.namespaces.within(node, start)
        began_s = time.monotonic()
        try:
            out, err = process.communicate(text or "", timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            err += "did not end within 20 s"
        return done(process.returncode, out, err, began_s)

    def prepare(self, nodes: Iterable[str]) -> None:
        """Have a tc stand ready in each."""
        for node in set(nodes) - set(self.standing):
            self.standing[node] = self.namespaces.within(node, StandingTc)

    def change(self, node: str, lines: list[str]) -> dict[str, Any]:
        self.prepare([node])
        began_s = time.monotonic()
        err = self.standing[node].do(lines)
        if self.standing[node].gone:
            del self.standing[node]
        return done(int(bool(err)), "", err, began_s)


class QdiscReader:
    """Counters of every queueing discipline of one namespace, by netlink: a command would cost too much."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self.socket.bind((0, 0))
        self.request = struct.pack("=IHHII", 36, K_RTM_GETQDISC, 0x301, 1, 0) + bytes(20)

    def read(self) -> dict[tuple[int, int], Counters]:
        """{(interface index, handle >> 16): (bytes, packets, drops, backlog_bytes, queued packets)}"""
        self.socket.send(self.request)
        found: dict[tuple[int, int], Counters] = {}
        while True:
            data = self.socket.recv(65536)
            at = 0
            while at < len(data):
                length, kind = struct.unpack_from("=IH", data, at)
                if kind in (K_NLMSG_DONE, K_NLMSG_ERROR):
                    return found
                if kind == K_RTM_NEWQDISC:
                    index, handle = struct.unpack_from("=4xiI", data, at + 16)
                    found[index, handle >> 16] = self._stats(data, at + 36, at + length)
                at += (length + 3) & ~3

    @staticmethod
    def _stats(data: bytes, at: int, end: int) -> Counters:
        total_bytes = packets = drops = backlog = queued = 0
        while at + 4 <= end:
            length, kind = struct.unpack_from("=HH", data, at)
            if kind & 0x3FFF == K_TCA_STATS2:
                inner, stop = at + 4, at + length
                while inner + 4 <= stop:
                    size, what = struct.unpack_from("=HH", data, inner)
                    what &= 0x3FFF
                    if what == K_STATS_BASIC:
                        total_bytes, packets = struct.unpack_from("=QI", data, inner + 4)
                    elif what == K_STATS_QUEUE:
                        queued, backlog, drops = struct.unpack_from("=III", data, inner + 4)
                    inner += (size + 3) & ~3
            at += (length + 3) & ~3
        return total_bytes, packets, drops, backlog, queued


class LagProbe:
    """How late this kernel's netem lets packets go: frames that wait in line on a cable of its own.

    Its netem is so slow that each is due some 60 ms after the one before, and a second's are sent ahead: they
    leave by the kernel's timers alone, whether this process runs or not (at full rate it doesn't for 50 ms,
    and packets pass), and while the whole router stands still all that are due come late. The kernel stamps
    both ends, for the same reason.
    """

    def __init__(self, run: Callable[[list[str]], dict[str, Any]]) -> None:
        for words in (
            "ip link add lag0 type veth peer name lag1",
            "ip link set lag0 up",
            "ip link set lag1 up",
            f"tc qdisc add dev lag0 root netem limit 1000 rate {K_PROBE_BYTES_PER_S * 8}bit",
        ):
            if (answer := run(words.split()))["rc"]:
                raise OSError(answer["err"])
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self.sender = socket.socket(socket.AF_PACKET, kind, 0)
        self.sender.bind(("lag0", 0))
        self.sender.setsockopt(socket.SOL_SOCKET, K_SO_TIMESTAMPING, K_STAMP_AT_QUEUE)
        self.receiver = socket.socket(socket.AF_PACKET, kind, socket.htons(K_PROBE_ETHERTYPE))
        self.receiver.bind(("lag1", K_PROBE_ETHERTYPE))
        self.receiver.setsockopt(socket.SOL_SOCKET, K_SO_TIMESTAMPING, K_STAMP_ARRIVAL)
        self.head = b"\xff" * 6 + b"\x02\x72\0\0\0\1" + struct.pack("!H", K_PROBE_ETHERTYPE)
        self.number = self.planned_ns = self.due_ns = 0
        self.on_way: dict[int, list[int]] = {}  # number: when it entered the queue, how long it takes there

    def send(self) -> None:
        """Fill the line up."""
        now_ns = time.clock_gettime_ns(time.CLOCK_REALTIME)
        self.planned_ns = max(self.planned_ns, now_ns)
        while self.planned_ns < now_ns + K_PROBES_AHEAD_NS:
            # Of mixed lengths: not in step with anything.
            self.number += 1
            length = K_PROBE_LEAST_BYTES + self.number * 47 % K_PROBE_LENGTHS
            takes_ns = length * 1_000_000_000 // K_PROBE_BYTES_PER_S
            self.on_way[self.number] = [now_ns, takes_ns]  # this time must do if the kernel stamps none
            self.planned_ns += takes_ns
            self.sender.send((self.head + struct.pack("=Q", self.number)).ljust(length, b"\0"))

    def receive(self) -> Iterator[int]:
        """The lag of each that arrived, in microseconds."""
        for number, entered_ns in stamped(self.sender, socket.MSG_ERRQUEUE):
            if number in self.on_way:
                self.on_way[number][0] = entered_ns
        for number, arrived_ns in stamped(self.receiver, 0):
            if number not in self.on_way:
                continue
            for each in [each for each in self.on_way if each <= number]:
                entered_ns, takes_ns = self.on_way.pop(each)
                self.due_ns = max(self.due_ns, entered_ns) + takes_ns  # as netem reckons
            yield (arrived_ns - self.due_ns) // 1000


def stamped(sock: socket.socket, flags: int) -> Iterator[tuple[int, int]]:
    """Probes' numbers with the kernel's time, of the frames that wait there."""
    while True:
        try:
            frame, notes, _, _ = sock.recvmsg(128, 256, flags)
        except BlockingIOError:
            return
        for level, kind, value in notes:
            if level == socket.SOL_SOCKET and kind == K_SO_TIMESTAMPING:
                seconds, rest_ns = struct.unpack_from("=qq", value)
                yield struct.unpack_from("=Q", frame, 14)[0], seconds * 1_000_000_000 + rest_ns


class Observer:
    """Counters of links and of what must not happen, once every_s."""

    def __init__(
        self, namespaces: Namespaces, links: dict[str, list[str]], edges: dict[str, list[str]],
        every_s: float, probe: LagProbe,
    ) -> None:  # fmt: skip
        self.namespaces, self.every_s, self.probe = namespaces, every_s, probe
        self.links: dict[str, tuple[str, int]] = {}
        self.edges: dict[str, tuple[str, str, int]] = {}
        nodes = {node for node, _ in [*links.values(), *edges.values()]}
        self.readers = {node: namespaces.within(node, QdiscReader) for node in nodes}
        for name, (node, device) in links.items():
            self.links[name] = node, self._index(node, device)
        for name, (node, device) in edges.items():
            self.edges[name] = node, device, self._index(node, device)
        self.count = 0
        self.accidents: dict[str, int] = {}

    def _index(self, node: str, device: str) -> int:
        return int(self.namespaces.within(node, lambda: socket.if_nametoindex(device)))

    def sample(self) -> dict[str, Any]:
        """Per link [bytes, packets, netem's drops, queue's drops, queue bytes, packets held]; accidents."""
        stats = {node: reader.read() for node, reader in self.readers.items()}
        at_s = time.monotonic()
        lags_us = list(self.probe.receive())  # at once: what comes while the rest is read is the next one's
        rows = {}
        for name, (node, index) in self.links.items():
            line, queue = (stats[node].get((index, handle), K_NOTHING) for handle in (1, 2))
            rows[name] = [line[0], line[1], line[2], queue[2], queue[3], line[4]]
        if self.count % 10 == 0:
            self.accidents = self._accidents(stats)
        self.count += 1
        self.probe.send()
        return {"at_s": at_s, "links": rows, "lags_us": lags_us, "accidents": self.accidents}

    def _accidents(self, stats: dict[str, dict[tuple[int, int], Counters]]) -> dict[str, int]:
        """Counts of drops that no link planned: devices' errors, their own queues, the kernel's backlog."""
        found: dict[str, int] = {}
        for name, (node, device, index) in self.edges.items():
            text = self.namespaces.within(node, lambda: read("/proc/thread-self/net/dev"))
            for line in text.splitlines():
                label, _, rest = line.partition(":")
                if label.strip() == device:
                    fields = [int(field) for field in rest.split()]
                    found[f"{name} device"] = fields[2] + fields[3] + fields[10] + fields[11]
            found[f"{name} device queue"] = sum(v[2] for k, v in stats[node].items() if k[0] == index)
        rows = read("/proc/net/softnet_stat").splitlines()
        found["kernel backlog"] = sum(int(row.split()[1], 16) for row in rows)
        return found


def read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


class Agent:
    def __init__(self, source: int, sink: int) -> None:
        self.source, self.sink = source, sink
        self.namespaces = Namespaces()
        self.commands = Commands(self.namespaces)
        self.observer: Observer | None = None
        self.answers: dict[int, dict[str, Any]] = {}
        self.pending, self.going = b"", True

    def say(self, message: dict[str, Any]) -> None:
        data = f"\n{json.dumps(message, separators=(',', ':'))}\n".encode()
        while data:
            data = data[os.write(self.sink, data) :]

    def loop(self) -> None:
        self.say({"ready": os.getpid(), "now_s": time.monotonic()})
        next_sample_s = 0.0
        while self.going:
            wait_s = max(0.0, next_sample_s - time.monotonic()) if self.observer else None
            ready, _, _ = select.select([self.source], [], [], wait_s)
            if self.observer and (now := time.monotonic()) >= next_sample_s:
                self.say({"sample": self.observer.sample()})
                next_sample_s = max(next_sample_s + self.observer.every_s, now)
            if self.source in ready:
                self._take()

    def _take(self) -> None:
        data = os.read(self.source, 65536)
        if not data:
            self.going = False
        *lines, self.pending = (self.pending + data).split(b"\n")
        for line in lines:
            try:
                order = json.loads(line)
                number = int(order["id"])
            except (ValueError, KeyError, TypeError):
                continue
            if number in self.answers:
                self.say(self.answers[number])
                continue
            try:
                answer = self._do(order)
            except Exception as error:
                answer = {"rc": 255, "out": "", "err": f"{type(error).__name__}: {error}"}
            self.answers[number] = {"id": number, "now_s": time.monotonic(), **answer}
            while len(self.answers) > K_KEPT_ANSWERS:
                del self.answers[next(iter(self.answers))]
            self.say(self.answers[number])

    def _do(self, order: dict[str, Any]) -> dict[str, Any]:
        what = order["do"]
        if what == "run":
            return self.commands.run(order["node"], order["argv"], order.get("input"))
        if what == "change":
            return self.commands.change(order["node"], order["lines"])
        if what == "prepare":
            self.commands.prepare(order["nodes"])
        elif what == "observe":
            self.commands.prepare(node for node, _ in order["links"].values())
            probe = LagProbe(lambda argv: self.commands.run(None, argv, None))
            links, edges, every_s = order["links"], order["edges"], order["every_s"]
            self.observer = Observer(self.namespaces, links, edges, every_s, probe)
        elif what == "stop":
            self.going = False
        elif what != "clock":
            raise ValueError(f"unknown order {what!r}")
        return {"rc": 0}


if __name__ == "__main__":
    if os.getpid() == 1:  # ahead of the guest's packet thread, which at full load would leave nothing
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    Agent(int(sys.argv[1]), int(sys.argv[2])).loop()
    if os.getpid() == 1:
        libc.reboot(K_POWER_OFF)
