"""SGLang's own test cases with a tiny model and no GPU: their code as it is in the wheel, models and flags
set here.

Run by SGLang's Python: `python suite.py CASE MODELS_DIR PORT`, or CASE,CASE… of those in K_KITS, which share
a pair of servers. The backend is the one that SGLANG_TEST_PD_DISAGG_BACKEND names, as SGLang means it to be.
The last line of its output is JSON: a row a case.
"""

from __future__ import annotations

import json
import os
import sys
import time
import unittest
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from prfaas_testbed.instances.models import K_MODELS
from prfaas_testbed.instances.sglang_server import K_CPU_ARGS, K_CPU_ENV, K_OWNER, K_PYTHONPATH

K_HERE = Path(__file__).resolve().parent
K_DECODE_ARGS = ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
K_BOUNDED_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,8}$"},
        "population": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "population"],
    "additionalProperties": False,
}


def environment() -> dict[str, str]:
    own = {"SGLANG_HOST_IP": "127.0.0.1", "PYTHONPATH": K_PYTHONPATH, K_OWNER: str(os.getpid())}
    return {**K_CPU_ENV, **own}


def cpu_args(model: str, *more: str) -> list[str]:
    sizes = ["--context-length", "16384", "--max-total-tokens", "32768"]
    return [*K_CPU_ARGS, *sizes, *K_MODELS[model].server_args, *more]


def launch_balancer(cls: Any) -> None:
    """In the place of the router that SGLang's fixture starts, which isn't in its wheel."""
    from sglang.test.test_utils import popen_with_error_check

    cls.process_lb = popen_with_error_check(
        [
            sys.executable,
            str(K_HERE / "balancer.py"),
            cls.lb_port,
            cls.prefill_url,
            cls.bootstrap_port,
            cls.decode_url,
        ]
    )
    cls.wait_server_ready(cls.lb_url + "/health", process=cls.process_lb)


def prepare(models: Path, port: int) -> Any:
    """SGLang's fixture, for a CPU. Returns its class."""
    from sglang.test.server_fixtures import disaggregation_fixture as fixture

    fixture.DEFAULT_URL_FOR_TEST = f"http://127.0.0.1:{port}"
    base = fixture.PDDisaggregationServerBase
    base.extra_prefill_env = base.extra_decode_env = environment()
    base.decode_base_gpu_id = 0
    base.launch_lb = classmethod(launch_balancer)
    return base


Make = Callable[[Path, int], type[unittest.TestCase]]
"""From the models' folder and a first port."""


def parity(model: str, *decode_args: str) -> Make:
    def make(models: Path, port: int) -> type[unittest.TestCase]:
        base = prepare(models, port)
        from sglang.test.kits.pd_parity_kit import PDLogprobParityMixin

        class Parity(PDLogprobParityMixin, base):  # type: ignore[misc, valid-type]
            reference_parallel_args: list[str] = []  # noqa: RUF012
            extra_prefill_args = cpu_args(model)
            extra_decode_args = cpu_args(model, *K_DECODE_ARGS, *K_MODELS[model].decode_args, *decode_args)
            baseline_args = cpu_args(model)
            parity_prompts = [[4 + (7 * i) % 990 for i in range(n)] for n in (20, 257, 2048)]  # noqa: RUF012
            parity_max_new_tokens = 8
            # A hybrid's state is there at the end of the earlier prompt only, and the same prompt doesn't
            # reach it.
            parity_cached_prefix_min_prompt_tokens = 1000 if model == "dense" else None

        Parity.model = str(models / model)
        return Parity

    return make


@dataclass(frozen=True)
class Kit:
    """One of SGLang's that it runs on single servers and on pairs alike."""

    module: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def mixin(self) -> type:
        found: type = getattr(import_module(f"sglang.test.kits.{self.module}"), self.name)
        return found


K_KITS: dict[str, Kit] = {
    # A model of random weights ends neither a name nor a number by itself.
    "structured-output": Kit(
        "json_constrained_kit", "JSONConstrainedMixin", {"json_schema": json.dumps(K_BOUNDED_SCHEMA)}
    ),
    "pause-resume": Kit(
        "pause_generation_kit",
        "PauseResumeInPlaceMixin",
        {"pause_num_requests": 16, "pause_ignore_eos": True},
    ),
    "abort-all": Kit("abort_timeout_kit", "AbortAllMixin", {"abort_all_num_requests": 8}),
}


def with_kits(*cases: str) -> Make:
    """These kits against one pair, as SGLang's own classes take several."""

    def make(models: Path, port: int) -> type[unittest.TestCase]:
        base = prepare(models, port)

        def launch(cls: Any) -> None:
            super(made, cls).setUpClass()
            cls.launch_all()
            cls.process = cls.process_decode  # what kits look after
            cls.pause_target_urls = [cls.prefill_url, cls.decode_url]

        fields = {
            "model": str(models / "dense"),
            "extra_prefill_args": cpu_args("dense"),
            "extra_decode_args": cpu_args("dense", *K_DECODE_ARGS),
            "setUpClass": classmethod(launch),
        }
        for case in cases:
            fields |= K_KITS[case].settings
        made = type("Kits", (*(K_KITS[case].mixin() for case in cases), base), fields)
        return made

    return make


def liveness(name: str) -> Make:
    def make(models: Path, port: int) -> type[unittest.TestCase]:
        base = prepare(models, port)
        # Failures are drawn once a side of a request, not once a poll: see draws/peers_draws.py.
        path = os.pathsep.join((K_PYTHONPATH, str(K_HERE / "draws")))
        base.extra_prefill_env = base.extra_decode_env = {**environment(), "PYTHONPATH": path}
        from sglang.test.manual.disaggregation import test_disaggregation_peer_liveness_abort as module

        module.DEFAULT_MODEL_NAME_FOR_TEST = str(models / "dense")
        module.PD_EXTRA_ARGS = cpu_args(
            "dense",
            "--max-running-requests",
            "4",
            "--chunked-prefill-size",
            "512",
            *K_DECODE_ARGS,
        )
        # 28,000 characters are more of the tiny tokenizer's tokens than its context holds.
        module.PD_LONG_PROMPT = module.PD_LONG_PROMPT[:1800]
        return getattr(module, name)  # type: ignore[no-any-return]

    return make


def chunked_abort(models: Path, port: int) -> type[unittest.TestCase]:
    prepare(models, port)
    from sglang.test.manual.disaggregation import test_disaggregation_chunked_prefill_abort as module

    module.DEFAULT_SMALL_MODEL_NAME_FOR_TEST = str(models / "dense")
    module.PD_EXTRA_ARGS = cpu_args(
        "dense", "--max-running-requests", "4", "--chunked-prefill-size", "64", *K_DECODE_ARGS
    )
    module.LONG_PROMPT = module.LONG_PROMPT[:12000]
    return module.TestDisaggChunkedPrefillAbort


K_CASES: dict[str, Make] = {
    "parity-dense": parity("dense"),
    "parity-hybrid": parity("hybrid"),
    "parity-dense-decode-radix-cache": parity("dense", "--disaggregation-decode-enable-radix-cache"),
    "peer-liveness-failures": liveness("TestDisaggregationPeerLivenessAbort"),
    "peer-liveness-clean-abort": liveness("TestDisaggregationPeerLivenessCleanRecovery"),
    "chunked-prefill-abort": chunked_abort,
    **{case: with_kits(case) for case in K_KITS},
}


class Timed(unittest.TextTestResult):
    """What each test took, by its method's name."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.took_s: dict[str, float] = {}

    def startTest(self, test: unittest.TestCase) -> None:
        self._began_s = time.monotonic()
        super().startTest(test)

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        self.took_s[method_of(test)] = time.monotonic() - self._began_s


def method_of(test: Any) -> str:
    """The method that a test or one of its parts is; "" of what failed before there was one."""
    whole = getattr(test, "test_case", test)
    return str(getattr(whole, "_testMethodName", ""))


def row_of(case: str, result: Timed, methods: set[str]) -> dict[str, Any]:
    """What a case came to, of whose class `methods` are the tests. A failure of none of them is of all."""
    wrong = [said for test, said in (*result.failures, *result.errors) if method_of(test) in methods | {""}]
    ran = methods & set(result.took_s)
    return {
        "case": case,
        "run": len(ran),
        "outcome": "failed" if wrong or not ran else "passed",
        "tests_seconds": round(sum(result.took_s[name] for name in ran), 1),
        "why": wrong[0].strip().splitlines()[-1][:500] if wrong else "",
    }


def main(argv: list[str]) -> int:
    _, cases, models, port = argv
    names = cases.split(",")
    os.environ.update(environment())
    # SGLang's plugins register the backend in this process as in its servers.
    from sglang.srt.plugins import load_plugins

    load_plugins()
    made = (K_CASES[cases] if len(names) == 1 else with_kits(*names))(Path(models), int(port))
    loader = unittest.defaultTestLoader
    suite = loader.loadTestsFromTestCase(made)
    runner = unittest.TextTestRunner(stream=sys.stdout, verbosity=2, resultclass=Timed)
    result: Any = runner.run(suite)
    tests_of = {name: set(loader.getTestCaseNames(K_KITS[name].mixin())) for name in names if name in K_KITS}  # type: ignore[arg-type]
    everything = set(loader.getTestCaseNames(made))
    rows = [row_of(name, result, tests_of.get(name, everything)) for name in names]
    sys.stdout.write(json.dumps(rows) + "\n")
    return any(row["outcome"] == "failed" for row in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
