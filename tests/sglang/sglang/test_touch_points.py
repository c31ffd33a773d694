"""The SGLang that is pinned is the one the backend is made for, and one that moved ends a launch at once."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from prfaas.sglang import touch_points
from prfaas_testbed.instances.models import K_MODELS
from prfaas_testbed.instances.sglang_server import (
    K_CHECKOUT,
    K_PYTHONPATH,
    ServerDied,
    ServerSpec,
    SglangServer,
    sglang_python,
)

K_INSIDE = Path(__file__).parent / "inside"
"""Files for SGLang's Python, with its plugins loaded; each says a line."""
K_RUN = """
import runpy, sys
from sglang.srt.plugins import load_plugins
load_plugins()
for path in sys.argv[1:]:
    if path.endswith(".py"):
        runpy.run_path(path)
"""

Job = Callable[[Path], Any]
"""Something to be found out in processes of its own, given a folder."""


def finds(job: Job) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The test is about what `job` finds, which is its `found`."""

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        test.job = job  # type: ignore[attr-defined]
        return test

    return mark


@pytest.fixture(scope="module")
def jobs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Job, Any]]:
    """Those of the tests that are to run, as many at a time as there are cores: most of each is imports."""
    tests = [item.function for item in request.session.items if item.path == request.path]  # type: ignore[attr-defined]
    wanted = dict.fromkeys(test.job for test in tests if hasattr(test, "job"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {job: pool.submit(job, tmp_path_factory.mktemp("job")) for job in wanted}


@pytest.fixture
def found(request: pytest.FixtureRequest, jobs: dict[Job, Any]) -> Any:
    return jobs[request.function.job].result()


def run_python(script: str, *argv: str, config: Path | None = None) -> list[str]:
    """The lines that a script says, run by SGLang's Python as on a CPU server."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    env |= {"PYTHONPATH": K_PYTHONPATH, "SGLANG_USE_CPU_ENGINE": "1"}
    if config is not None:
        env["PRFAAS_CONFIG"] = str(config)
    done = subprocess.run(
        [str(sglang_python()), "-W", "ignore", "-c", script, *argv],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()


def last_words_of_launch(spec: ServerSpec, folder: Path) -> str:
    """Why a server that must not start didn't."""
    with SglangServer(spec, folder / "server.log") as server:
        with pytest.raises(ServerDied) as caught:
            server.wait_ready(timeout_s=300)
        return str(caught.value)


K_HOOKS = """
def hooks_of_ours():
    from sglang.srt.plugins.hook_registry import HookRegistry as registry
    hooks = {t: [getattr(h, "__module__", "") for _, h, _ in found] for t, found in registry._hooks.items()}
    return {t: ours for t, all in hooks.items() if (ours := [m for m in all if m.startswith("prfaas.")])}
"""
K_HANDS_ON = {touch_points.K_GET_KV_CLASS: ["prfaas.sglang.plugin"]}

K_LOAD = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
load_plugins()
from prfaas.sglang import plugin
plugin.load_plugin()
from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES as legal
from sglang.srt.disaggregation import utils
members = [m.value for m in utils.TransferBackend]
assert legal.count("prfaas") == members.count("prfaas") == 1, (legal, members)
ours = utils.get_kv_class(utils.TransferBackend("prfaas"), utils.KVClassType.MANAGER)
stock = utils.get_kv_class(utils.TransferBackend.MOONCAKE, utils.KVClassType.MANAGER)
print(ours.__module__, stock.__module__)
print(json.dumps(hooks_of_ours()))
"""


@finds(lambda _: run_python(K_HOOKS + K_LOAD, "--disaggregation-transfer-backend", "prfaas"))
def test_plugin_loads_once_however_often_and_leaves_other_backends_alone(found: list[str]) -> None:
    classes, hooks = found[-2:]
    assert classes.split() == ["prfaas.sglang.backend", "sglang.srt.disaggregation.mooncake.conn"]
    answering = (touch_points.K_PREPARE_ABORT, touch_points.K_HANDLE_ABORT, touch_points.K_SERVE_HTTP)
    assert json.loads(hooks) == K_HANDS_ON | {name: ["prfaas.sglang.answers"] for name in answering}


K_WORKERS = """
import multiprocessing
from sglang.srt.plugins import load_plugins
load_plugins()
worker = multiprocessing.get_context("spawn").Process(target=exec, args=(sys.argv[-1],))
worker.start()
worker.join()
sys.exit(worker.exitcode)
"""
K_WORKER = """
import importlib, json, os
module, name = os.environ["SGLANG_HTTP_SERVER_APP_PATH"].split(":")
app = getattr(importlib.import_module(module), name)
from sglang.srt.disaggregation.utils import TransferBackend
print(TransferBackend("prfaas").value, [one.cls.__name__ for one in app.user_middleware])
print(json.dumps(hooks_of_ours()))
"""


def start_worker(_: Path) -> list[str]:
    worker = K_HOOKS.replace("def hooks_of_ours", "global hooks_of_ours\ndef hooks_of_ours") + K_WORKER
    flags = ("--disaggregation-transfer-backend", "prfaas", "--tokenizer-worker-num", "2")
    return run_python("import sys\n" + K_WORKERS, *flags, worker)


@finds(start_worker)
def test_each_of_several_http_workers_knows_the_backend_and_answers_refusals(found: list[str]) -> None:
    knows, hooks = found[-2:]
    assert knows.startswith("prfaas ['RefusalAnswers'")  # around all others
    assert json.loads(hooks)[touch_points.K_HANDLE_ABORT] == ["prfaas.sglang.answers"]


K_WITHOUT = """
import json, sys
from sglang.srt.disaggregation import utils  # as a scheduler has, before its plugins load
from sglang.srt.plugins import load_plugins; load_plugins()
print(json.dumps(sorted(m for m in sys.modules if m.startswith(('prfaas.', 'crc32c')))))
print(json.dumps(hooks_of_ours()))
"""


@finds(lambda _: run_python(K_HOOKS + K_WITHOUT, "--disaggregation-transfer-backend", "mooncake"))
def test_server_without_the_backend_imports_none_of_it_and_has_one_hook_that_hands_on(
    found: list[str],
) -> None:
    modules, hooks = (json.loads(line) for line in found[-2:])
    assert modules == [
        "prfaas.model",
        "prfaas.model.errors",
        "prfaas.sglang",
        "prfaas.sglang.command_line",
        "prfaas.sglang.compat",
        "prfaas.sglang.control",
        "prfaas.sglang.plugin",
        "prfaas.sglang.touch_points",
    ]
    assert hooks == K_HANDS_ON


def fill_pools(folder: Path) -> list[str]:
    flags = ("--disaggregation-transfer-backend", "prfaas", "--disaggregation-mode", "prefill")
    config = folder / "prfaas.yaml"
    config.write_text("overlap: layer\npump: {site: test, control_socket: p.sock, idle_exit_s: 1}\n")
    return run_python(K_RUN, *flags, str(K_INSIDE / "pools.py"), config=config)


@finds(fill_pools)
def test_each_kind_of_pool_tells_which_of_its_buffers_a_layer_has_filled(found: list[str]) -> None:
    """In order of the layers: of keys and values, or of latents. A sliding window's layers are state, and
    tell nothing."""
    assert json.loads(found[-1]) == {
        "mha": [[0, 3], [1, 4], [2, 5]],
        "mla": [[0], [1], [2]],
        "mla in parts": [[0], [1], [2]],
        "hybrid": [[0, 2], [1, 3]],
        "hybrid mla": [[0], [1]],
        "window": [[0, 2], [1, 3]],
    }


def look_and_map(_: Path) -> list[str]:
    """What these say, all in one interpreter, in which they change nothing."""
    return run_python(K_RUN, *(str(K_INSIDE / f"{name}.py") for name in ("versions", "ranks", "slices")))


@finds(look_and_map)
def test_every_touch_point_is_in_the_pinned_version(found: list[str]) -> None:
    assert found[-3] == touch_points.K_VERSION


@finds(look_and_map)
def test_a_lease_waits_for_as_many_senders_as_sglang_maps_to_it_each_under_a_name_of_its_own(
    found: list[str],
) -> None:
    """Whatever tensor, context and pipeline parallelism prefill has, and whatever decode has of tensor and
    pipeline parallelism and DP attention; and a pipeline's stages fill each of decode's layers once."""
    n, wrong, stages = json.loads(found[-2])
    assert n > 1000
    assert wrong == []
    assert [to_k for to_k, _ in stages] == [[100 + 2 * i, 101 + 2 * i] for i in range(4)]
    assert [to_v for _, to_v in stages] == [[108 + 2 * i, 109 + 2 * i] for i in range(4)]


@finds(look_and_map)
def test_slices_of_unequal_ranks_are_mapped_alike_without_a_list_of_each_tokens(found: list[str]) -> None:
    n, wrong, kinds = json.loads(found[-1])
    assert n > 1000
    assert wrong == []
    assert kinds == ["Column", "list"]


K_DOCTOR = """
import importlib.abc, importlib.machinery, sys
NAME = "sglang.srt.disaggregation.mooncake.conn"
class Doctor(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            del module.MooncakeKVManager.maybe_send_extra
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Doctor())
"""


def launch_doctored(folder: Path) -> str:
    """On a path that begins with a folder which makes of SGLang one that has lost a method."""
    (folder / "sitecustomize.py").write_text(K_DOCTOR)
    spec = ServerSpec(
        role="prefill",
        model=K_MODELS["dense"],
        model_dir=K_CHECKOUT / ".cache" / "models" / "dense",
        host="127.0.0.1",
        port=1,
        bootstrap_port=2,
        extra_env={"PYTHONPATH": os.pathsep.join((str(folder), K_PYTHONPATH))},
    )
    return last_words_of_launch(spec, folder)


@finds(launch_doctored)
def test_launch_on_an_sglang_that_moved_fails_at_once_and_says_what_was_expected(found: str) -> None:
    assert "MooncakeKVManager: expected a method maybe_send_extra, found NoneType" in found
    assert f"made for SGLang {touch_points.K_VERSION}" in found


def launch_with_a_wrong_file(folder: Path) -> str:
    config = folder / "prfaas.yaml"
    config.write_text("pump: {site: east, max_streams: 0}\n")
    spec = ServerSpec(
        role="decode",
        model=K_MODELS["dense"],
        model_dir=K_CHECKOUT / ".cache" / "models" / "dense",
        host="127.0.0.1",
        port=1,
        bootstrap_port=2,
        config_path=config,
    )
    return last_words_of_launch(spec, folder).replace(str(config), "THE FILE")


@finds(launch_with_a_wrong_file)
def test_file_that_is_wrong_ends_the_launch_with_file_field_and_value(found: str) -> None:
    assert "prfaas: THE FILE: pump.max_streams: found 0" in found
