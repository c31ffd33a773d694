"""Stand-ins, the router and what stands beside it; and what else the machine did meanwhile."""

from __future__ import annotations

import http.client
import multiprocessing
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
import yaml
from load import Load
from stand_ins import stand_in

K_HERE = Path(__file__).resolve().parents[2]
K_STEP_S = 0.020  # between tokens
K_SETTLE_S = 60.0
K_PROMPT_TOKENS = 512
K_COUNTED = tuple(
    f"prfaas_router_{one}" for one in ("decisions", "decide_seconds_", "held_seconds_", "requests")
)
K_IDLE_CPU_S = 0.06  # in 2 s, all routers together: an idle one polls its servers


class Watch:
    """What else the machine did: processors' time that neither we nor what we started took."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self.before = self._times()

    @staticmethod
    def _times() -> tuple[float, float, float]:
        every, me = psutil.cpu_times(), psutil.Process()
        ours = 0.0
        for one in (me, *me.children(recursive=True)):
            try:
                spent = one.cpu_times()
            except psutil.NoSuchProcess:
                continue
            ours += spent.user + spent.system + (spent.children_user + spent.children_system) * (one == me)
        return sum(every) - every.idle - every.iowait - every.steal - every.guest, every.steal, ours

    def seen(self) -> dict[str, float]:
        """In processors: 0.1 is a tenth of one."""
        busy, steal, ours = (now - then for now, then in zip(self._times(), self.before, strict=True))
        span_s = time.monotonic() - self.began_s
        return {
            "others_cpus": round(max(0.0, busy - ours) / span_s, 3),
            "stolen_cpus": round(steal / span_s, 3),
            "load_average": os.getloadavg()[0],
        }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


def tokenizer(folder: Path) -> None:
    """About a token a syllable, as real vocabularies have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    corpus = [" ".join(f"word{i}" for i in range(170))] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    made.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    )


class Stage:
    """Stand-ins, the router, and what stands beside it; all ended by `close`."""

    def __init__(self, tokens: int, beside: list[str], step_s: float = K_STEP_S, work_s: float = 0.0) -> None:
        """`work_s`: prompts wait for one another, so long each; a router by deadline stands there as well."""
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        tokenizer(folder)
        self.prefill, self.decode, self.router = free_port(), free_port(), free_port()
        spawn = multiprocessing.get_context("spawn")
        self.workers = [
            spawn.Process(target=stand_in, args=(role, port, tokens, step_s, work_s), daemon=True)
            for role, port in (("prefill", self.prefill), ("decode", self.decode))
        ]
        for worker in self.workers:
            worker.start()
        servers = [
            {"name": "p", "role": "prefill", "url": f"http://127.0.0.1:{self.prefill}", "bootstrap_port": 1},
            {"name": "d", "role": "decode", "url": f"http://127.0.0.1:{self.decode}"},
        ]
        config = {
            "listen": {"port": self.router},
            "models": [{"name": "m", "tokenizer": str(folder)}],
            "sites": [{"name": "west", "servers": servers}],
        }
        configs = {"prfaas": config}
        if work_s:
            cost = {"base_s": 0.0, "prefill_tokens_per_s": K_PROMPT_TOKENS / work_s}
            ordered = [servers[0] | {"ordered": True}, servers[1]]
            configs["prfaas-by-deadline"] = config | {
                "listen": {"port": free_port()},
                "sites": [{"name": "west", "cost": cost, "servers": ordered}],
                "policy": {"name": "prices", "service": "deadline"},
            }
        # Routers share the last core, everything else the others: "on one core" is meant, and a load that
        # competes with what it measures measures itself. Threads keep the core that their process began on.
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            for worker in self.workers:
                psutil.Process(worker.pid).cpu_affinity(cores[:-1])
            os.sched_setaffinity(0, cores[-1:])
        self.ports, self.processes = {}, {}
        for name, one in configs.items():
            file = folder / f"{name}.yaml"
            file.write_text(yaml.safe_dump(one))
            command = [str(K_HERE / ".venv/bin/prfaas"), "router", "--config", str(file)]
            self.ports[name] = one["listen"]["port"]
            self.processes[name] = subprocess.Popen([*command, "--log-level", "warning"])
        for entry in beside:
            name, _, text = entry.partition("=")
            port = free_port()
            words = text.format(
                host="127.0.0.1",
                port=port,
                prefill=f"http://127.0.0.1:{self.prefill}",
                decode=f"http://127.0.0.1:{self.decode}",
                bootstrap=1,
                prometheus=free_port(),
            )
            self.ports[name] = port
            self.processes[name] = subprocess.Popen(
                shlex.split(words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        if len(cores) > 1:
            os.sched_setaffinity(0, cores[:-1])
        for name, port in self.ports.items():
            self._wait(name, port)
            self._answers(name, port)

    def _wait(self, name: str, port: int) -> None:
        end = time.monotonic() + 90
        while True:
            if self.processes[name].poll() is not None:
                raise SystemExit(f"{name} ended with {self.processes[name].returncode}")
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                if time.monotonic() > end:
                    raise SystemExit(f"{name} doesn't listen") from None
                time.sleep(0.1)

    def _answers(self, name: str, port: int) -> None:
        """Some listen before they know their servers."""
        end = time.monotonic() + 60
        body = Load(1, 0).body()
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            try:
                connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                said = answer.read()
                if answer.status == 200:
                    return
            except OSError as error:
                said = repr(error).encode()
            finally:
                connection.close()
            if time.monotonic() > end:
                raise SystemExit(f"{name} doesn't serve: {said[:300].decode(errors='replace')}")
            time.sleep(0.2)

    def cpu_s(self, name: str) -> float:
        process = psutil.Process(self.processes[name].pid)
        found = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        return float(sum(one.user + one.system for one in found))

    def settle(self) -> None:
        """Some are busy with themselves for a while after they first serve, on the core that all share."""
        end = time.monotonic() + K_SETTLE_S
        while time.monotonic() < end:
            before = sum(map(self.cpu_s, self.processes))
            time.sleep(2)
            if sum(map(self.cpu_s, self.processes)) - before < K_IDLE_CPU_S:
                return

    def counted(self, name: str) -> dict[str, float]:
        """What a router of ours has counted of decisions, and of what it held."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[name]}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        rows = [line.rpartition(" ") for line in lines if line.startswith(K_COUNTED)]
        return {key: float(value) for key, _, value in rows if "_created" not in key and "_bucket" not in key}

    def rss_mib(self, name: str) -> float:
        return psutil.Process(self.processes[name].pid).memory_info().rss / (1 << 20)

    def close(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for worker in self.workers:
            worker.terminate()
            worker.join()
        self.folder.cleanup()
