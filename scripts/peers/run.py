"""Runs SGLang's own cases against each backend and reports them side by side.

With --out the report of a folder is made in parts: rows that aren't run again stay.
`--smoke`, a minute: that each case can be imported and takes its flags and that the backend's name is legal,
without a server. Exit status: 0 prfaas passed all it supports; 1 it didn't; 2 usage.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from suite import K_KITS

from prfaas_testbed.experiment.machine import commit, machine, versions
from prfaas_testbed.instances.sglang_server import K_CHECKOUT, K_PYTHONPATH, end_tree, sglang_python

K_HERE = Path(__file__).resolve().parent
K_BACKENDS = ("prfaas", "mooncake_tcp")
K_CASES = (
    "parity-dense",
    "parity-hybrid",
    "parity-dense-decode-radix-cache",
    "peer-liveness-failures",
    "peer-liveness-clean-abort",
    "chunked-prefill-abort",
    "structured-output",
    "pause-resume",
    "abort-all",
)
K_UNSUPPORTED = (
    (
        "kv-checksum",
        "not in the 0.5.23 wheel; tests/sglang has its like, with SGLang's checksum in Python for CPUs",
    ),
    (
        "structured output by regular expression and grammar",
        "the kits ask for n=3, and SGLang gives all samples of a request one bootstrap room",
    ),
    ("first-token EOS (test_disaggregation_basic)", "not in the 0.5.23 wheel; tests/sglang has its like"),
    ("pause with retraction (test_disaggregation_basic)", "not in the 0.5.23 wheel; tests/sglang retracts"),
    ("different TP, PP, DP attention", "several GPUs"),
    ("EAGLE3 speculation", "no CPU path in SGLang 0.5.23"),
)
K_CASE_TIMEOUT_S = 900.0


def now() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def free_base_port() -> int:
    """A port P with P+100 … P+500 free as well: SGLang's fixture counts from it."""
    for base in range(21000, 31000, 100):
        try:
            for offset in range(0, 600, 100):
                socket.create_server(("127.0.0.1", base + offset)).close()
        except OSError:
            continue
        return base
    raise SystemExit("no free ports between 21000 and 31500")


def batches(cases: Sequence[str]) -> list[list[str]]:
    """Cases that share servers run together, at the place of the first. Pure."""
    shared = [case for case in cases if case in K_KITS]
    found = [[case] if case not in shared else shared for case in cases if case not in shared[1:]]
    return found


def run_cases(backend: str, cases: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """Cases that share servers, in a process of their own, its output in a file; a row each of what they come
    to."""
    log = out / f"{backend}.{cases[0]}.log"
    config = out / "prfaas.yaml"
    config.write_text(yaml.safe_dump({"pump": {"site": "peers", "control_socket": str(out / "pump.sock")}}))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
        "SGLANG_TEST_PD_DISAGG_BACKEND": backend,
        "PRFAAS_CONFIG": str(config),
        "PYTHONPATH": os.pathsep.join((K_PYTHONPATH, str(K_CHECKOUT / "testbed"))),
    }
    python = sglang_python()
    models = K_CHECKOUT / ".cache" / "models"
    # SGLang's fixture starts servers by `python3`.
    env["PATH"] = f"{python.parent}{os.pathsep}{env['PATH']}"
    started_s = time.monotonic()
    with log.open("wb") as written:
        process = subprocess.Popen(
            [str(python), str(K_HERE / "suite.py"), ",".join(cases), str(models), str(free_base_port())],
            stdout=written,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )
        try:
            process.wait(K_CASE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            end_tree(process)
    common = {
        "backend": backend,
        "at": now(),
        "commit": commit(),
        "outcome": "failed",
        "seconds": round(time.monotonic() - started_s, 1),
        "why": f"ended with {process.returncode}: see {log.name}",
    }
    lines = log.read_text(errors="replace").strip().splitlines()
    said: list[dict[str, Any]] = []
    try:
        said = json.loads(lines[-1]) if lines else []
    except ValueError:
        pass
    told = {row["case"]: row for row in said}
    return [{**common, "case": case, **told.get(case, {})} for case in cases]


def smoke() -> int:
    """What can rot without a server being started: imports, names, the flag."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import os, suite; os.environ.update(suite.environment())\n"
        "from pathlib import Path\n"
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES as legal\n"
        "assert 'prfaas' in legal, legal\n"
        "import unittest\n"
        "for name, make in suite.K_CASES.items():\n"
        "    case = make(Path(sys.argv[2]), 21000)\n"
        "    n = unittest.defaultTestLoader.loadTestsFromTestCase(case).countTestCases()\n"
        "    assert n > 0, name\n"
        "    print(name, n)\n"
    )
    models = str(K_CHECKOUT / ".cache" / "models")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((K_PYTHONPATH, str(K_CHECKOUT / "testbed")))}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env["SGLANG_USE_CPU_ENGINE"] = "1"
    done = subprocess.run(
        [str(sglang_python()), "-W", "ignore", "-c", script, str(K_HERE), models],
        env=env, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    names = [line.split()[0] for line in done.stdout.splitlines() if line.split()[0] in K_CASES]
    ok = done.returncode == 0 and sorted(names) == sorted(K_CASES)
    sys.stdout.write(done.stdout if ok else done.stdout + done.stderr)
    sys.stdout.write(f"{len(names)} of {len(K_CASES)} of SGLang's cases can be run\n")
    return 0 if ok else 1


def earlier(report: Path) -> list[dict[str, Any]]:
    """What an earlier run left in the same folder."""
    if not report.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(report.read_text())["rows"]
    return [row for row in rows if row["outcome"] != "unsupported"]


def keep(out: Path, stamp: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the report; its rows, in their order, with those of what can't be run."""
    rows = sorted(rows, key=lambda row: (K_CASES.index(row["case"]), K_BACKENDS.index(row["backend"])))
    rows += [
        {"backend": backend, "case": case, "outcome": "unsupported", "why": why}
        for case, why in K_UNSUPPORTED
        for backend in K_BACKENDS
        if backend in {row["backend"] for row in rows}
    ]
    record = {
        "stamp": stamp, "versions": versions(K_CHECKOUT / ".venv-sglang"), "machine": machine(), "rows": rows,
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps(record, indent=1) + "\n")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'backend':14}{'case':34}{'outcome':12}{'seconds':>8}  why"]
    for row in rows:
        seconds = f"{row['seconds']:8.1f}" if "seconds" in row else " " * 8
        lines.append(
            f"{row['backend']:14}{row['case']:34}{row['outcome']:12}{seconds}  {row.get('why', '')}".rstrip()
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="test-peers", allow_abbrev=False)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--backend", action="append", choices=K_BACKENDS)
    parser.add_argument("--case", action="append", choices=K_CASES)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.smoke:
        return smoke()
    stamp = now()
    out = (args.out or K_CHECKOUT / "results" / "test-peers" / stamp).resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = earlier(out / "report.json")
    for cases in batches(args.case or K_CASES):
        for backend in args.backend or K_BACKENDS:
            sys.stderr.write(f"{backend}: {', '.join(cases)} …\n")
            new = run_cases(backend, cases, out)
            rows = [row for row in rows if row["backend"] != backend or row["case"] not in cases] + new
            sys.stderr.write("\n".join(table(new).splitlines()[1:]) + "\n")
            # After each case: all take most of an hour, and who is interrupted keeps what was run.
            written = keep(out, stamp, rows)
    sys.stdout.write(table(written))
    # A peer beside ours is a control, which may fall short; alone, it is what was asked about.
    judged = [row for row in rows if row["backend"] == "prfaas"] or rows
    return 0 if all(row["outcome"] == "passed" for row in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
