"""A real SGLang server on this machine's CPU (or its GPU): its command and environment, its start, its
readiness, its end.

How a server is used:

    spec = ServerSpec(role="prefill", model=K_MODELS["dense"], model_dir=models / "dense", host="127.0.0.1",
                      port=30001, bootstrap_port=30002, config_path=config)
    server = SglangServer(spec, log_path=logs / "prefill.log", popen=site.popen)
    server.start()
    server.wait_ready(progress=print_line)
    …
    server.stop()

`popen` is subprocess.Popen or a site's own with the same arguments. Several servers are started first and
waited for after, since most of a start is imports.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from prfaas.model.errors import MachineError, PrfaasError, UsageError
from prfaas_testbed.instances.models import TinyModel

Role = Literal["plain", "prefill", "decode"]
K_ROLES: tuple[Role, ...] = ("plain", "prefill", "decode")
K_CPU_PATH = Path(__file__).resolve().parent / "cpu" / "path"
K_CHECKOUT = Path(__file__).resolve().parents[3]
K_PYTHONPATH = os.pathsep.join(map(str, (K_CPU_PATH, K_CHECKOUT / "plugin")))
"""Of every server: what its CPU needs, and this checkout's plugin. The environment's own may be another
checkout's, the one that set-up was made in.
"""
K_READY = "Uvicorn running"  # with --skip-server-warmup nothing later is printed
K_DYING = "Received sigquit from a child process"
K_START_TIMEOUT_S = 300.0  # two at once took 45–77 s on two quiet cores
K_STOP_GRACE_S = 2.0  # SGLang drains for long; there is nothing of it to keep
K_POLL_S = 0.25
K_PROGRESS_EVERY_S = 10.0

# The fraction is a ceiling that nothing reaches, --max-total-tokens being far below; a tight one fails when
# other processes take memory between two of SGLang's looks at what is free.
K_CPU_ARGS = (
    "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch",
    "--disable-overlap-schedule", "--sleep-on-idle", "--skip-server-warmup", "--mem-fraction-static", "0.4",
    "--max-running-requests", "8", "--dtype", "bfloat16",
)  # fmt: skip
K_CUDA_ARGS = (
    "--device", "cuda", "--attention-backend", "triton", "--sampling-backend", "pytorch",
    "--cuda-graph-backend-prefill", "disabled", "--cuda-graph-backend-decode", "disabled",
    "--skip-server-warmup", "--mem-fraction-static", "0.4", "--max-running-requests", "8",
    "--dtype", "bfloat16",
)  # fmt: skip
"""Three servers share a GPU. With SGLang's overlap of scheduler and GPU, which the CPU has none of."""
K_SAME_CHUNKS = ("--prefill-max-requests", "1")
"""One prompt a prefill batch: else arrivals decide where a prompt is cut into chunks, bfloat16 rounds
otherwise for each cut, and two right servers can disagree about a token. For all that are compared."""
K_BY_PRIORITY = ("--enable-priority-scheduling", "--disable-priority-preemption")
"""What waits is served by its priority; what runs isn't pushed out."""
K_CPU_ENV = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    # A scheduler's start-up banner and tracebacks arrive in the log when they happen.
    "PYTHONUNBUFFERED": "1",
    # A site has no resolver, and torch asks for the name of each address that it hears from.
    "RES_OPTIONS": "timeout:1 attempts:1",
    # Of its own two hundred modules of models a server imports those of our tiny ones.
    "SGLANG_EXTERNAL_MODEL_PACKAGE": "prfaas_cpu.models",
}
K_FORK = "PRFAAS_CPU_FORK"
"""By it the CPU servers' own plugin has a server's processes forked, where SGLang spawns them, each of which
then imports what its parent has. Empty in the environment: spawned."""
K_OWNER = "PRFAAS_CPU_OWNER"
"""Whose end is the server's too, by the CPU servers' own plugin: a testbed or a test run that is killed by -9
leaves none behind."""


K_PREFIXES_BYTES = 256 << 20
K_EVENTS_TOPIC = "kv-events"


def prefixes_section(host: str, port: int) -> dict[str, Any]:
    """`prefixes:` of the backend's file, for one that answers there."""
    return {"listen": f"{host}:{port}", "store_bytes": K_PREFIXES_BYTES}


def prefixes_words() -> list[str]:
    """What goes with it on the command line."""
    linker = {"linker": "PrefixLinker", "linker_module_path": "prfaas.sglang.prefixes.linker"}
    return [
        "--enable-unified-cache-external-linker", "--unified-cache-external-linker-backend", "dynamic",
        "--unified-cache-external-linker-config", json.dumps(linker),
    ]  # fmt: skip


def events_words(port: int, replay_port: int) -> list[str]:
    """By which a server tells what it caches."""
    events = {
        "publisher": "zmq", "endpoint": f"tcp://*:{port}", "replay_endpoint": f"tcp://*:{replay_port}",
        "topic": K_EVENTS_TOPIC,
    }  # fmt: skip
    return ["--kv-events-config", json.dumps(events)]


class ServerDied(PrfaasError):
    """A server ended, or was about to, when it should have been serving. The message has its last words."""


@dataclass(frozen=True)
class ServerSpec:
    """All that decides a server's command line and environment."""

    role: Role
    model: TinyModel
    model_dir: Path
    host: str
    """Address it binds, and the one it advertises to peers."""
    port: int
    bootstrap_port: int | None = None
    """Prefill: bound. Decode: where its peers' bootstrap is by default. Plain: unused."""
    backend: str = "prfaas"
    config_path: Path | None = None
    """The backend's configuration, given as PRFAAS_CONFIG."""
    context_tokens: int = 16384
    pool_tokens: int = 65536
    """KV pool of the server, shared by its running requests."""
    device: Literal["cpu", "cuda"] = "cpu"
    extra_args: Sequence[str] = ()
    """Later flags win, so these override everything."""
    extra_env: Mapping[str, str] = field(default_factory=dict)
    spawn: bool = False
    """On a CPU too its processes are spawned, as everywhere else; a start takes more than twice as long."""

    def __post_init__(self) -> None:
        if self.role not in K_ROLES:
            raise UsageError(f"server role {self.role!r}; allowed: {', '.join(K_ROLES)}")
        if self.role != "plain" and self.bootstrap_port is None:
            raise UsageError(f"a {self.role} server needs a bootstrap port")

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


def sglang_python() -> Path:
    """The Python that has SGLang: PRFAAS_SGLANG_PYTHON, else the checkout's .venv-sglang. Raises MachineError
    for what a start needs and this machine lacks.
    """
    named = os.environ.get("PRFAAS_SGLANG_PYTHON")
    python = Path(named) if named else K_CHECKOUT / ".venv-sglang" / "bin" / "python"
    if not python.exists():
        raise MachineError(
            f"no SGLang environment at {python}: run `make setup`, or set PRFAAS_SGLANG_PYTHON"
        )
    if shutil.which("lscpu") is None:  # SGLang asks it for the cores, and ends without a word that names it
        raise MachineError("lscpu is missing, by which SGLang counts cores; install util-linux")
    return python


def build_command(spec: ServerSpec, python: Path) -> list[str]:
    """The launch line. Pure."""
    of_device = K_CPU_ARGS if spec.device == "cpu" else K_CUDA_ARGS
    words = [
        str(python), "-m", "sglang.launch_server", "--model-path", str(spec.model_dir), "--host", spec.host,
        "--port", str(spec.port), *of_device, "--context-length", str(spec.context_tokens),
        "--max-total-tokens", str(spec.pool_tokens), *spec.model.server_args,
    ]  # fmt: skip
    if spec.role != "plain":
        words += [
            "--disaggregation-mode", spec.role, "--disaggregation-transfer-backend", spec.backend,
            "--disaggregation-bootstrap-port", str(spec.bootstrap_port),
        ]  # fmt: skip
    if spec.role == "decode":
        if spec.device == "cpu":
            # Retraction's default backup asks for CUDA and ends the server.
            words += ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
        words += spec.model.decode_args
    return [*words, *spec.extra_args]


def build_environment(spec: ServerSpec, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment. Pure. PYTHONDONTWRITEBYTECODE goes: each of SGLang's processes would compile
    everything anew.
    """
    env = {name: value for name, value in inherited.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env |= {"SGLANG_HOST_IP": spec.host}
    if spec.device == "cpu":
        env |= K_CPU_ENV | {"PYTHONPATH": K_PYTHONPATH} | dict(spec.model.server_env)
        env[K_FORK] = "" if spec.spawn else inherited.get(K_FORK, "1")
    else:
        env |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(K_CHECKOUT / "plugin")}
    if spec.config_path is not None:
        env["PRFAAS_CONFIG"] = str(spec.config_path)
    return env | dict(spec.extra_env)


class SglangServer:
    """One server process with its children."""

    def __init__(
        self,
        spec: ServerSpec,
        log_path: Path,
        popen: Callable[..., subprocess.Popen[Any]] = subprocess.Popen,
        python: Path | None = None,
    ) -> None:
        self.spec, self.log_path = spec, log_path
        self._popen, self._python = popen, python
        self._process: subprocess.Popen[Any] | None = None
        self._started_s = 0.0
        self._from = 0
        """Where its words begin: what the server that it follows said stands before them."""
        self.start_seconds: float | None = None
        """From start() to readiness, once ready."""

    @property
    def name(self) -> str:
        return f"{self.spec.role} server ({self.spec.model.name}, {self.spec.host}:{self.spec.port})"

    @property
    def url(self) -> str:
        return self.spec.url

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Launch it and return at once. Raises MachineError when SGLang isn't installed or the port is
        taken.
        """
        command = build_command(self.spec, self._python or sglang_python())
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._started_s = time.monotonic()
        with self.log_path.open("ab") as log:
            self._from = log.tell()
            self._process = self._popen(
                command,
                env=build_environment(self.spec, os.environ) | {K_OWNER: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to handle, in order
            )

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def check_alive(self) -> None:
        """Raises ServerDied with the server's last words if it has ended."""
        if not self.alive():
            status = self._process.returncode if self._process else None
            raise ServerDied(
                f"{self.name} ended with {status}: {last_words(self._text())}; log: {self.log_path}"
            )

    def wait_ready(
        self, timeout_s: float = K_START_TIMEOUT_S, progress: Callable[[str], None] = lambda line: None
    ) -> None:
        """Return when it serves. Raises ServerDied when it ends or says it will, or isn't ready in time."""
        said_s = time.monotonic()
        while True:
            text = self._text()
            if K_READY in text and K_DYING not in text:
                self.start_seconds = time.monotonic() - self._started_s
                progress(f"{self.name} ready after {self.start_seconds:.0f} s")
                return
            if K_DYING in text:
                raise ServerDied(f"{self.name} died at start: {last_words(text)}; log: {self.log_path}")
            self.check_alive()
            now_s = time.monotonic()
            if now_s - self._started_s > timeout_s:
                raise ServerDied(
                    f"{self.name} not ready after {timeout_s:.0f} s: {last_words(text)}; log: {self.log_path}"
                )
            if now_s - said_s >= K_PROGRESS_EVERY_S:
                said_s = now_s
                progress(f"{self.name} starting, {now_s - self._started_s:.0f} s: {start_phase(text)}")
            time.sleep(K_POLL_S)

    def stop(self) -> None:
        """End it and every process below it, by their ids. Harmless when it has ended or never started."""
        if self._process is not None:
            end_tree(self._process)

    def kill(self) -> None:
        """As a crash: SIGKILL to the whole tree at once."""
        if self._process is not None:
            end_tree(self._process, grace_s=0.0)

    def _text(self) -> str:
        try:
            return self.log_path.read_bytes()[self._from :].decode(errors="replace")
        except FileNotFoundError:
            return ""

    def __enter__(self) -> SglangServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def end_tree(process: subprocess.Popen[Any], grace_s: float = K_STOP_GRACE_S) -> None:
    """SIGTERM to a process and all below it, SIGKILL to what is left after `grace_s`; returns when none is
    left.
    """
    tree = _tree(process.pid)
    if grace_s > 0:
        _signal_all(tree, signal.SIGTERM)
        _, tree_left = psutil.wait_procs(tree, timeout=grace_s)
        tree = list({*tree_left, *_tree(process.pid)})
    _signal_all(tree, signal.SIGKILL)
    psutil.wait_procs(tree, timeout=10)
    process.wait(timeout=10)


def _tree(pid: int) -> list[psutil.Process]:
    """A process and all below it, but for a pump: one that a server found missing and started is the node's,
    serves others as well, and ends by itself."""
    try:
        top = psutil.Process(pid)
        below = [process for child in top.children() if not _is_pump(child) for process in _tree(child.pid)]
        return [top, *below]
    except psutil.NoSuchProcess:
        return []


def _is_pump(process: psutil.Process) -> bool:
    try:
        return "prfaas.pump" in process.cmdline() and os.getsid(process.pid) == process.pid
    except (psutil.Error, ProcessLookupError):
        return False


def _signal_all(processes: Sequence[psutil.Process], signum: int) -> None:
    for process in processes:
        try:
            process.send_signal(signum)
        except psutil.NoSuchProcess:
            pass


_STAMP = re.compile(r"^\[?\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[^\]]*\]?\s*")
# An exception's own line: a dotted name that ends as exceptions' names do.
_EXCEPTION = re.compile(
    r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Refused|Mismatch)\b(?::.*)?$"
)
_USAGE_ERROR = re.compile(r"^(\S*: error: .+|prfaas: .+: .+)")
_NOISE = ("/freeze_gc", "Received sigquit", "resource_tracker", "leaked", "warnings.warn")


def last_words(text: str) -> str:
    """The line that most likely says why a server died: its last exception, else its last line that isn't
    noise.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        bare = _STAMP.sub("", line)
        if (_EXCEPTION.match(bare) or _USAGE_ERROR.match(bare)) and not any(word in bare for word in _NOISE):
            return bare
    for line in reversed(lines):
        if not any(word in line for word in _NOISE):
            return _STAMP.sub("", line)
    return "no output"


K_PHASES = (
    ("Uvicorn running", "serving"),
    ("max_total_num_tokens", "memory pools made"),
    ("Memory pool end", "memory pools made"),
    ("Load weight end", "weights loaded"),
    ("Load weight begin", "loading weights"),
    ("Init torch distributed", "process group"),
    ("server_args=", "importing in child processes"),
)


def start_phase(text: str) -> str:
    """How far a start has come, by what its log has."""
    return next((phase for mark, phase in K_PHASES if mark in text), "importing")
