"""The launcher's pure parts, and its handling of a server that is a small script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

import prfaas
from prfaas.model.errors import MachineError, UsageError
from prfaas_testbed.instances import sglang_server
from prfaas_testbed.instances.models import K_MODELS
from prfaas_testbed.instances.sglang_server import (
    K_CHECKOUT,
    K_FORK,
    ServerDied,
    ServerSpec,
    SglangServer,
    build_command,
    build_environment,
    last_words,
    start_phase,
)


def spec(**changes: Any) -> ServerSpec:
    fields: dict[str, Any] = {
        "role": "decode",
        "model": K_MODELS["hybrid"],
        "model_dir": Path("/m"),
        "host": "10.0.0.2",
        "port": 30001,
        "bootstrap_port": 30002,
    }
    return ServerSpec(**{**fields, **changes})


def value_of(words: list[str], flag: str) -> str:
    """The last one counts, as SGLang reads them."""
    return words[len(words) - 1 - words[::-1].index(flag) + 1]


def test_plain_server_has_no_disaggregation_flags() -> None:
    words = build_command(spec(role="plain", bootstrap_port=None), Path("python"))
    assert not [word for word in words if word.startswith("--disaggregation")]


def test_decode_server_names_backend_mode_and_a_backup_that_a_cpu_has() -> None:
    words = build_command(spec(), Path("python"))
    assert value_of(words, "--disaggregation-mode") == "decode"
    assert value_of(words, "--disaggregation-transfer-backend") == "prfaas"
    assert value_of(words, "--disaggregation-decode-retraction-backup") == "cpu_tensor"
    assert value_of(words, "--max-mamba-cache-size") == "64"


def test_a_server_on_a_gpu_has_nothing_of_a_cpus(tmp_path: Path) -> None:
    words = build_command(spec(device="cuda"), Path("python"))
    assert value_of(words, "--device") == "cuda"
    assert value_of(words, "--max-mamba-cache-size") == "64"
    assert not {"--disaggregation-decode-retraction-backup", "--disable-overlap-schedule"} & set(words)
    env = build_environment(spec(device="cuda"), {})
    assert env["PYTHONPATH"] == str(K_CHECKOUT / "plugin")
    assert "SGLANG_USE_CPU_ENGINE" not in env


def test_extra_flags_come_last_and_win() -> None:
    words = build_command(spec(extra_args=("--context-length", "99")), Path("python"))
    assert value_of(words, "--context-length") == "99"


def test_environment_lets_bytecode_be_written_and_puts_the_stand_in_first(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    inherited = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": "/elsewhere", "HOME": "/h"}
    env = build_environment(spec(config_path=config, extra_env={"X": "1"}), inherited)
    assert "PYTHONDONTWRITEBYTECODE" not in env
    cpu, plugin = map(Path, env["PYTHONPATH"].split(os.pathsep))
    assert (cpu / "sgl_kernel" / "__init__.py").exists()
    assert plugin / "prfaas" / "__init__.py" == Path(prfaas.__file__), "another checkout's plugin"
    assert (env["HOME"], env["X"], env["PRFAAS_CONFIG"]) == ("/h", "1", str(config))
    assert env["SGLANG_HOST_IP"] == "10.0.0.2"


def test_a_cpu_servers_processes_are_forked_unless_the_spec_or_the_environment_says_otherwise() -> None:
    assert build_environment(spec(), {})[K_FORK] == "1"
    assert build_environment(spec(), {K_FORK: ""})[K_FORK] == ""
    assert build_environment(spec(spawn=True), {K_FORK: "1"})[K_FORK] == ""
    assert K_FORK not in build_environment(spec(device="cuda"), {})


def test_stand_ins_entry_point_is_where_python_finds_it() -> None:
    from importlib.metadata import distributions

    found = [e for d in distributions(path=[str(sglang_server.K_CPU_PATH)]) for e in d.entry_points]
    assert [(e.group, e.value) for e in found] == [("sglang.srt.plugins", "prfaas_cpu.plugin:load_plugin")]


@pytest.mark.parametrize(
    ("change", "says"), [({"role": "router"}, "plain, prefill"), ({"bootstrap_port": None}, "port")]
)
def test_a_spec_that_cannot_be_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        spec(**change)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Traceback (most recent call last):\nValueError: no such model\n[2026-01-01 00:00:00] bye\n",
         "ValueError: no such model"),
        ("torch.cuda.OutOfMemoryError: big\nresource_tracker: x\n", "torch.cuda.OutOfMemoryError: big"),
        ("usage: x\nlaunch_server.py: error: argument --a: invalid choice: 'b'\n",
         "launch_server.py: error: argument --a: invalid choice: 'b'"),
        ("prfaas: made for SGLang 1, this is 2: x\n", "prfaas: made for SGLang 1, this is 2: x"),
        ("[2026-01-01 00:00:00] all is well\nReceived sigquit from a child\n", "all is well"),
        ("", "no output"),
    ],
)  # fmt: skip
def test_last_words_are_the_exception_or_the_last_line_that_means_something(text: str, words: str) -> None:
    assert last_words(text) == words


def test_start_phase_names_the_latest_step() -> None:
    assert start_phase("") == "importing"
    assert start_phase("server_args=…\nLoad weight begin.") == "loading weights"


def server(tmp_path: Path, script: str) -> SglangServer:
    """A server whose process is a script."""

    def popen(command: list[str], **how: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen([sys.executable, "-c", script], **how)

    return SglangServer(spec(), tmp_path / "log" / "s.log", popen=popen, python=Path(sys.executable))


K_SERVE = "import time; print('Uvicorn running', flush=True); time.sleep(60)"


def test_server_is_ready_when_it_says_so_and_ends_with_all_below_it(tmp_path: Path) -> None:
    said: list[str] = []
    script = (
        "import subprocess, sys, time\n"
        "deaf = 'import signal, time; signal.signal(15, 1); time.sleep(60)'\n"
        "subprocess.Popen([sys.executable, '-c', deaf])\n" + K_SERVE
    )
    with server(tmp_path, script) as running:
        running.wait_ready(timeout_s=15, progress=said.append)
        assert running.pid is not None
        tree = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
        assert len(tree) == 2
        running.check_alive()
    assert not [p for p in tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert "ready after" in said[-1]
    running.stop()  # a second time does nothing


def test_pump_that_a_server_started_outlives_it(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "wait = [sys.executable, '-c', 'import time; time.sleep(60)', 'prfaas.pump']\n"
        "print(subprocess.Popen(wait, start_new_session=True).pid, flush=True)\n" + K_SERVE
    )
    with server(tmp_path, script) as running:
        running.wait_ready(timeout_s=15)
        pump = psutil.Process(int(running.log_path.read_text().split()[0]))
    assert pump.is_running()
    pump.kill()
    pump.wait(10)


def test_server_that_dies_at_start_is_reported_by_its_last_words(tmp_path: Path) -> None:
    with server(tmp_path, "raise RuntimeError('the model is not there')") as dying:
        with pytest.raises(ServerDied, match="ended with 1: RuntimeError: the model is not there") as caught:
            dying.wait_ready(timeout_s=15)
        assert str(tmp_path) in str(caught.value)


def test_server_that_is_started_again_leaves_the_log_of_its_first_life_and_is_judged_by_its_own(
    tmp_path: Path,
) -> None:
    with server(tmp_path, K_SERVE) as first:
        first.wait_ready(timeout_s=15)
        first.kill()
        mute = server(tmp_path, "import time; time.sleep(60)")
        with mute, pytest.raises(ServerDied, match="not ready after 0 s: no output"):
            mute.wait_ready(timeout_s=0.5)
        with server(tmp_path, K_SERVE) as second:
            second.wait_ready(timeout_s=15)
            assert second.log_path.read_text().count("Uvicorn running") == 2


def test_server_whose_child_died_is_not_waited_for(tmp_path: Path) -> None:
    script = (
        "print('OSError: disk full'); print('Received sigquit from a child process', flush=True); " + K_SERVE
    )
    with (
        server(tmp_path, script) as dying,
        pytest.raises(ServerDied, match="died at start: OSError: disk full"),
    ):
        dying.wait_ready(timeout_s=15)


def test_server_that_is_not_ready_in_time_says_what_it_said_last(tmp_path: Path) -> None:
    script = "import time; print('loading', flush=True); time.sleep(60)"
    with server(tmp_path, script) as slow, pytest.raises(ServerDied, match="not ready after 1 s"):
        slow.wait_ready(timeout_s=1)


def test_without_an_sglang_environment_the_error_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRFAAS_SGLANG_PYTHON", str(tmp_path / "none"))
    with pytest.raises(MachineError, match="make setup"):
        sglang_server.sglang_python()


def test_models_predict_their_bytes() -> None:
    assert K_MODELS["dense"].kv_bytes_per_token == 1024
    assert (K_MODELS["hybrid"].kv_bytes_per_token, K_MODELS["hybrid"].state_bytes) == (256, 53760)
    assert (K_MODELS["kda"].kv_bytes_per_token, K_MODELS["kda"].state_bytes) == (128, 56064)
