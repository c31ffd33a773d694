"""SGLang's own test cases with a tiny model and no GPU: their code as it is in the wheel, models and flags
set here.

Run by SGLang's Python, a process a case: `python suite.py CASE MODELS_DIR PORT`. The backend is the one that
SGLANG_TEST_PD_DISAGG_BACKEND names, as SGLang means it to be. The last line of its output is JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
import unittest
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from prfaas_testbed.instances.models import K_MODELS
from prfaas_testbed.instances.sglang_server import K_CPU_ARGS, K_CPU_ENV, K_CPU_PATH, K_OWNER

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
    own = {"SGLANG_HOST_IP": "127.0.0.1", "PYTHONPATH": str(K_CPU_PATH), K_OWNER: str(os.getpid())}
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


def with_kit(module: str, name: str, **settings: Any) -> Make:
    """One of SGLang's kits, which it runs on single servers and on pairs alike, against a pair."""

    def make(models: Path, port: int) -> type[unittest.TestCase]:
        base = prepare(models, port)
        kit = getattr(import_module(f"sglang.test.kits.{module}"), name)

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
            **settings,
        }
        made = type(name, (kit, base), fields)
        return made

    return make


def liveness(name: str) -> Make:
    def make(models: Path, port: int) -> type[unittest.TestCase]:
        base = prepare(models, port)
        # Failures are drawn once a side of a request, not once a poll: see draws/peers_draws.py.
        path = os.pathsep.join((str(K_CPU_PATH), str(K_HERE / "draws")))
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
    # A model of random weights ends neither a name nor a number by itself.
    "structured-output": with_kit(
        "json_constrained_kit", "JSONConstrainedMixin", json_schema=json.dumps(K_BOUNDED_SCHEMA)
    ),
    "pause-resume": with_kit(
        "pause_generation_kit",
        "PauseResumeInPlaceMixin",
        pause_num_requests=16,
        pause_ignore_eos=True,
    ),
    "abort-all": with_kit("abort_timeout_kit", "AbortAllMixin", abort_all_num_requests=8),
}


def main(argv: list[str]) -> int:
    _, case, models, port = argv
    os.environ.update(environment())
    # SGLang's plugins register the backend in this process as in its servers.
    from sglang.srt.plugins import load_plugins

    load_plugins()
    made = K_CASES[case](Path(models), int(port))
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(made)
    started_s = time.monotonic()
    result = unittest.TextTestRunner(stream=sys.stdout, verbosity=2).run(suite)
    wrong = [*result.failures, *result.errors]
    sys.stdout.write(
        json.dumps(
            {
                "run": result.testsRun,
                "outcome": "failed" if wrong or not result.testsRun else "passed",
                "seconds": round(time.monotonic() - started_s, 1),
                "why": wrong[0][1].strip().splitlines()[-1][:500] if wrong else "",
            }
        )
        + "\n"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
