"""Three senders in three namespaces over one link, under one ledger: what is promised beside what is
estimated, who gets how much, and whether what was admitted came in its time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from prfaas.config.topology import LinkSpec, SiteSpec, Topology
from prfaas_testbed.bench import checks
from prfaas_testbed.bench.engines.prfaas import WORKER, start_pump
from prfaas_testbed.bench.harness import Progress, Row
from prfaas_testbed.bench.places import K_WAIT_S, Emulated
from prfaas_testbed.bench.worker import Worker, end_process

K_SENDERS = ("one", "two", "three")
K_RECEIVER = "west"
K_SITE = "east"  # of all three senders: its pumps share the ledger that the first of them keeps
K_RATE_MBPS = 200.0
K_POOL_BYTES = 16 << 20
K_LOOK_S = 0.05
K_DEPTH = 4
K_ORDERS = ((1_000_000, 5.0), (6_000_000, 20.0))
"""(bytes, deadline in seconds), in turns."""
K_REACH_S = 20.0
K_LIMIT_S = 120.0
K_FILLED = 0.9  # of what the link carries of payload
K_HEADERS = 1448 / 1514  # of an Ethernet frame
K_FAIR = 0.9  # Jain's index of the three senders' goodput; 1: all alike
K_ROUNDING = 1.001
K_SHARE_S = 1.0


def topology() -> Topology:
    """Each sender's own line is as wide as the one that all share. Pure."""
    between = [[name, "exchange"] for name in K_SENDERS]
    lines = [{"between": ends, "delay_ms": 1, "rate_mbps": K_RATE_MBPS} for ends in between]
    shared = {"between": ["exchange", K_RECEIVER], "delay_ms": 15, "rate_mbps": K_RATE_MBPS}
    return Topology(
        name="share",
        text="Three senders whose lines meet before one link.",
        sites={name: SiteSpec() for name in (*K_SENDERS, K_RECEIVER)},
        hubs=("exchange",),
        links=tuple(LinkSpec.model_validate(line) for line in [*lines, shared]),
    )


class Shared(Emulated):
    """An emulated network whose ends are its sites."""

    def site(self, end: str) -> str:
        return end


class Group:
    """The three senders and their receiver, each a server's process beside a pump, and one process more that
    watches the ledger. All end with `stack`.
    """

    def __init__(self, place: Shared, stack: ExitStack) -> None:
        self._place, self._stack = place, stack
        self._bases: dict[str, int] = {}
        self._pump(K_RECEIVER, K_RECEIVER)
        self.receiver = self._worker(K_RECEIVER, K_RECEIVER)
        keeper = ""
        self.senders: dict[str, Worker] = {}
        for name in K_SENDERS:
            admission = {
                "nominal_bps": 0.95 * K_RATE_MBPS * 1e6,
                "max_pumps": len(K_SENDERS),
                "share_ttl_s": K_SHARE_S,
            }
            self._pump(
                name, K_SITE, links=({"peer_site": K_RECEIVER, "host": keeper, "admission": admission},)
            )
            self.senders[name] = self._worker(name, name)
            keeper = keeper or self.senders[name].call("stats")["address"]
        self.watch = self._worker(K_SENDERS[0], "watch")

    def _pump(self, end: str, site: str, **fields: Any) -> None:
        pump, _ = start_pump(self._place, end, site, **fields)
        self._stack.callback(end_process, pump)
        self._stack.callback(pump.terminate)

    def _worker(self, end: str, name: str) -> Worker:
        def spawn(argv: Sequence[str], **options: Any) -> Any:
            return self._place.popen(end, argv, **options)

        worker = Worker(name, spawn, WORKER, self._place.workdir / f"{name}.log")
        self._stack.callback(worker.close)
        config = str(self._place.workdir / f"pump-{end}.yaml")
        self._bases[name] = worker.call("start", config=config, pool_bytes=K_POOL_BYTES)["base"]
        return worker

    def ready(self) -> None:
        """Wait until every sender's pump has its share from the keeper's, and streams to the receiver. Raises
        TimeoutError.
        """
        address = self.receiver.call("stats")["address"]
        for worker in self.senders.values():
            worker.call("prepare", address=address)
        give_up_s = time.monotonic() + K_REACH_S
        while not all(self._is_ready(worker) for worker in self.senders.values()):
            if time.monotonic() > give_up_s:
                raise TimeoutError("the senders' pumps don't reach their ledger")
            time.sleep(K_LOOK_S)

    @staticmethod
    def _is_ready(worker: Worker) -> bool:
        stats = worker.call("stats")
        (link,) = stats["links"]
        return bool(
            link["reachable"] and link["share_bps"] and any(peer["streams"] for peer in stats["peers"])
        )

    def look(self) -> Row:
        """What the ledger has promised now, beside what it may."""
        (link,) = self.watch.call("stats")["links"]
        return {
            "at_s": time.monotonic(),
            "promised_bps": link["promised_bps"],
            "estimate_bps": link["estimate"]["rate_bps"],
            "believed_bps": link["believed_bps"],
            "promised_bytes": link["promised_bytes"],
            "queued": link["queued"],
        }

    def run(self, orders: Sequence[tuple[int, float]]) -> tuple[dict[str, list[Row]], list[Row]]:
        """Every sender's transfers at once: how each went, by sender, and the looks meanwhile."""

        grants = {
            name: self.receiver.call("grant", room=room) for room, name in enumerate(self.senders, start=1)
        }

        def send(name: str) -> list[Row]:
            found: list[Row] = self.senders[name].call(
                "ask_and_send", timeout_s=K_LIMIT_S, grant=grants[name], peer_base=self._bases[K_RECEIVER],
                orders=list(orders), depth=K_DEPTH,
            )  # fmt: skip
            return found

        looks: list[Row] = []
        with ThreadPoolExecutor(len(grants)) as threads:
            under_way = {name: threads.submit(send, name) for name in grants}
            while not all(future.done() for future in under_way.values()):
                looks.append(self.look())
                time.sleep(K_LOOK_S)
            return {name: future.result() for name, future in under_way.items()}, looks


@contextmanager
def group(workdir: Path, progress: Progress, wait_s: float = K_WAIT_S) -> Iterator[tuple[Group, Shared]]:
    """The emulated network with all of it running. Raises MachineError or WorkerError."""
    from prfaas_testbed.network import open_network

    with ExitStack() as stack:
        network = stack.enter_context(open_network(topology(), workdir, progress, wait_s=wait_s))
        place = Shared(network, workdir)
        yield Group(place, stack), place


def measure(place_group: Group, rounds: int, progress: Progress) -> Row:
    """`rounds` of K_ORDERS from each sender."""
    place_group.ready()
    sent, looks = place_group.run(K_ORDERS * rounds)
    found = {"rate_mbps": K_RATE_MBPS, "senders": sent, "looks": looks, **summary(sent, looks)}
    progress(
        f"three senders: {', '.join(f'{mbps:.0f}' for mbps in found['goodput_mbps'].values())} Mbit/s, "
        f"{found['together_mbps']:.0f} together, promised at most {found['most_promised']:.3f} of the "
        f"estimate, {found['missed']} missed"
    )
    return found


def summary(sent: dict[str, list[Row]], looks: Sequence[Row]) -> Row:
    """Goodput of each while all had something to send, Jain's index of it, and what was promised. Pure."""
    rows = [row for found in sent.values() for row in found]
    done = {name: [row for row in found if row.get("ok")] for name, found in sent.items()}
    began_s = max(min(row["asked_s"] for row in found) for found in sent.values())
    ended_s = min(max((row["ended_s"] for row in found), default=began_s) for found in done.values())
    seconds = max(1e-9, ended_s - began_s)
    within = {
        name: sum(row["size_bytes"] for row in found if row["ended_s"] <= ended_s) * 8e-6 / seconds
        for name, found in done.items()
    }
    took_s = max((row["ended_s"] for found in done.values() for row in found), default=began_s) - began_s
    return {
        "goodput_mbps": within,
        # Of all to the last byte: what one leaves of the link when it is through is for the others.
        "together_mbps": sum(row["size_bytes"] for found in done.values() for row in found)
        * 8e-6
        / max(1e-9, took_s),
        "jain": jain(list(within.values())),
        "most_promised": most_promised(looks),
        "admitted": sum("admitted_s" in row for row in rows),
        "refused": sum("refused" in row for row in rows),
        "failed": sum("ended_s" in row and not row["ok"] for row in rows),
        "missed": sum(
            not row["ok"] or row["ended_s"] - row["asked_s"] > row["deadline_s"]
            for row in rows
            if "ended_s" in row
        ),
    }


def most_promised(looks: Sequence[Row]) -> float:
    """The most of the estimate that was promised at any look: of the largest that held while a share that was
    alive then was granted, for what is granted stands until its end when the estimate falls. Pure.
    """
    return max((look["promised_bps"] / max(look["believed_bps"], 1.0) for look in looks), default=0.0)


def jain(values: Sequence[float]) -> float:
    """Jain's fairness index: 1 when all are alike, 1/n when one has everything. Pure."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 0.0


def judge(found: Row) -> list[Row]:
    return [
        checks.at_most("share/most_promised_to_estimate", found["most_promised"], K_ROUNDING),
        checks.at_least("share/jain", found["jain"], K_FAIR),
        checks.at_least("share/filled", found["together_mbps"] / (found["rate_mbps"] * K_HEADERS), K_FILLED),
        checks.at_most("share/missed_of_admitted", found["missed"], 0),
    ]
