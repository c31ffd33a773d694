#!/usr/bin/env python3
"""Set-up of a bare machine, in steps that are skipped once done. Needs only Python 3.11 and, for Debian's
packages, root and apt-get.

    scripts/setup.py light             .venv: prfaas, the testbed, the tools of the tests
    scripts/setup.py system            Debian's packages for the emulated network and the baselines
    scripts/setup.py sglang            .venv-sglang (SGLang with torch), and the tiny models
    scripts/setup.py all

DRY_RUN=1 says what would be installed and changed, with sizes, and changes nothing.
Exit status: 0 done; 2 usage; 3 this machine lacks something, and which.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

K_ROOT = Path(__file__).resolve().parent.parent
K_LIGHT, K_SGLANG = K_ROOT / ".venv", K_ROOT / ".venv-sglang"
K_UV = "uv==0.13.9"
K_NOT_COMPILED = (
    "anthropic", "Cython", "cudnn", "flash_attn", "flashinfer", "fontTools", "matplotlib", "modelscope",
    "numba", "nvidia_cutlass_dsl", "nvshmem", "pandas", "pyarrow", "sglang/test", "tilelang", "timm",
    "transformers/models",
)  # fmt: skip
"""Half of SGLang's environment, of which servers on a CPU import next to nothing: compiled where they do."""
# Measured: 10.8 GiB from a bare checkout to the tiny models, as files are linked, not copied, from the cache,
# and 10.95 after all tests. The rest is room for captures and results.
K_FREE_BYTES = 12 * 2**30
K_DEBIAN = {
    "user-mode-linux": "the router that carries real netem, for kernels without it (116 MB)",
    "kmod": "modprobe inside that router",
    "mininet": "mnexec; without recommends",
    "iproute2": "ip and tc",
    "iputils-ping": "calibration of delay",
    "iperf3": "calibration of rate; a baseline",
    "ethtool": "offloads switched off, so that loss hits packets",
    "nftables": "bytes counted by port",
    "tcpdump": "captures at the WAN",
    "util-linux": "setpriv, unshare, chrt",
    "libibverbs1": "Mooncake's library, a baseline",
    "librdmacm1": "Mooncake's library, a baseline",
    "libnuma1": "Mooncake's and SGLang's libraries",
}


class Lacking(Exception):
    """This machine lacks something; the message says what."""


def say(text: str) -> None:
    sys.stderr.write(f"set-up: {text}\n")
    sys.stderr.flush()


def dry() -> bool:
    return os.environ.get("DRY_RUN", "") not in ("", "0")


def run(what: str, *command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run quietly into a log; a failure shows the log's end and names the command."""
    started = time.monotonic()
    say(f"{what} …")
    log = K_ROOT / ".cache" / "setup.log"
    log.parent.mkdir(exist_ok=True)
    words = [str(word) for word in command]
    # Bytecode is wanted: each SGLang process would otherwise compile everything again at its start.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | (env or {})
    with log.open("ab") as out:
        out.write(f"\n$ {' '.join(words)}\n".encode())
        out.flush()
        start = out.tell()
        status = subprocess.run(
            words, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment, cwd=K_ROOT
        ).returncode
    if status:
        tail = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()[-12:]
        raise Lacking(
            f"{what}: {words[0]} ended with {status}; {log} has it all, its end:\n  " + "\n  ".join(tail)
        )
    say(f"{what}: done in {time.monotonic() - started:.0f} s")


def digest(*parts: Path | str) -> str:
    """What a finished step was made from: files by content, strings as they are."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.read_bytes() if isinstance(part, Path) else part.encode())
    return total.hexdigest()


def packages(lock: Path) -> int:
    """How many a lock names."""
    return sum("==" in line for line in lock.read_text().splitlines())


def once(stamp: Path, made_from: str, step: Callable[[], None]) -> None:
    if stamp.exists() and stamp.read_text() == made_from:
        return
    step()
    stamp.write_text(made_from)


def need_disk(free_bytes: int) -> None:
    free = shutil.disk_usage(K_ROOT).free
    if free < free_bytes:
        raise Lacking(
            f"disk: {free / 2**30:.0f} GiB free under {K_ROOT}, {free_bytes / 2**30:.0f} GiB needed"
        )


def make_light() -> None:
    """.venv by pip's own venv, then uv in it, then the lock."""
    lock = K_ROOT / "requirements" / "light.lock"

    def step() -> None:
        if not (K_LIGHT / "bin" / "python").exists():
            run("making .venv", sys.executable, "-m", "venv", K_LIGHT)
        run("installing uv", K_LIGHT / "bin" / "python", "-m", "pip", "install", "--quiet", K_UV)
        run(
            f"installing the light environment ({packages(lock)} packages, about 0.9 GB)",
            *uv("pip", "install"),
            "--python",
            K_LIGHT / "bin" / "python",
            "--require-hashes",
            "--no-deps",
            "-r",
            lock,
        )
        run(
            "installing prfaas, editable",
            *uv("pip", "install"),
            "--python",
            K_LIGHT / "bin" / "python",
            "--no-deps",
            "--editable",
            K_ROOT,
        )

    light = digest(lock, K_ROOT / "pyproject.toml", K_UV)
    if dry():
        fresh = (K_LIGHT / ".made-from").exists() and (K_LIGHT / ".made-from").read_text() == light
        say(
            ".venv is ready"
            if fresh
            else f"would make .venv by requirements/light.lock: {packages(lock)} packages, about 0.9 GB"
        )
        return
    once(K_LIGHT / ".made-from", light, step)


def uv(*words: str) -> list[str | Path]:
    # One cache on the checkout's disk: uv then links files instead of copying 9.6 GB.
    return [K_LIGHT / "bin" / "uv", "--cache-dir", K_ROOT / ".cache" / "uv", "--quiet", *words]


def missing_packages() -> list[str]:
    known = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *K_DEBIAN],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    present = {line.split()[0] for line in known if line.endswith(" installed")}
    return [name for name in K_DEBIAN if name not in present]


def make_system() -> None:
    if not shutil.which("apt-get"):
        raise Lacking(
            "apt-get: the emulated network is set up on Debian 12 and its like; install "
            + ", ".join(K_DEBIAN)
            + " by hand elsewhere"
        )
    wanted = missing_packages()
    if dry():
        for name in wanted:
            say(f"would install Debian's {name}: {K_DEBIAN[name]}")
        say(
            "would change nothing else of the host; a run raises net.core.rmem_default and allows cubic and "
            "bbr, and puts both back"
            if wanted
            else "Debian's packages are ready"
        )
        return
    if not wanted:
        return
    if os.geteuid() != 0:
        raise Lacking(
            f"root: Debian's {', '.join(wanted)} must be installed; run as root or install them first"
        )
    say("Debian's packages to install: " + ", ".join(f"{name} ({K_DEBIAN[name]})" for name in wanted))
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get update", "apt-get", "update", "-q", env=env)
    run(
        "apt-get install (about 150 MB)",
        "apt-get",
        "install",
        "-y",
        "-q",
        "--no-install-recommends",
        *wanted,
        env=env,
    )


def make_sglang() -> None:
    lock = K_ROOT / "requirements" / "sglang.lock"
    python = K_SGLANG / "bin" / "python"

    def step() -> None:
        need_disk(K_FREE_BYTES)
        if not python.exists():
            run("making .venv-sglang", sys.executable, "-m", "venv", "--without-pip", K_SGLANG)
        run(
            f"installing SGLang 0.5.23 with torch ({packages(lock)} packages, 9.6 GB; minutes)",
            *uv("pip", "install"),
            "--python",
            python,
            "--require-hashes",
            "--no-deps",
            "-r",
            lock,
        )
        run(
            "installing prfaas beside it, editable",
            *uv("pip", "install"),
            "--python",
            python,
            "--no-deps",
            "--editable",
            K_ROOT,
        )
        run(
            "compiling its bytecode once",
            python,
            "-m",
            "compileall",
            "-q",
            "-j2",
            "-x",
            f"py312_intrinsics|site-packages/({'|'.join(K_NOT_COMPILED)})/",
            K_SGLANG / "lib",
        )  # torch ships one file that only Python 3.12 reads

    made_from = digest(lock, K_ROOT / "pyproject.toml")
    models = K_ROOT / "testbed" / "prfaas_testbed" / "instances" / "models.py"
    if dry():
        ready = (K_SGLANG / ".made-from").exists() and (K_SGLANG / ".made-from").read_text() == made_from
        say(
            ".venv-sglang is ready"
            if ready
            else "would make .venv-sglang by requirements/sglang.lock: SGLang 0.5.23, torch, 9.6 GB"
        )
        say("would make tiny models with random weights under .cache/models, some MB, if they are not there")
        return
    once(K_SGLANG / ".made-from", made_from, step)
    once(
        K_ROOT / ".cache" / "models.made-from",
        digest(models, made_from),
        lambda: run("making the tiny models", python, models, K_ROOT / ".cache" / "models"),
    )


K_STEPS: dict[str, tuple[Callable[[], None], ...]] = {
    "light": (make_light,),
    "system": (make_system,),
    "sglang": (make_light, make_sglang),
    "all": (make_system, make_light, make_sglang),
    "network": (make_system, make_light),
}


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in K_STEPS:
        say(f"usage: setup.py {'|'.join(K_STEPS)}")
        return 2
    (K_ROOT / ".cache").mkdir(exist_ok=True)
    with (K_ROOT / ".cache" / "setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second set-up beside this one waits, then finds all done
        try:
            for step in K_STEPS[sys.argv[1]]:
                step()
        except Lacking as error:
            say(str(error))
            say("exit status 3")
            return 3
        except KeyboardInterrupt:
            say("interrupted; what was finished stays, the next start goes on from there")
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
