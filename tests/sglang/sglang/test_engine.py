"""A decode engine made in Python (`sglang.Engine`), without a command line or HTTP, and a prefill server
whose link has no place: the caller is told what an HTTP client would be.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from prfaas_testbed.instances.sglang_client import new_room, post, prompt_of
from prfaas_testbed.instances.sglang_server import (
    K_OWNER,
    SglangServer,
    build_command,
    build_environment,
    end_tree,
    sglang_python,
)

pytestmark = pytest.mark.skipif(
    not os.environ.get("PRFAAS_LONG_TESTS"), reason="an engine of its own, minutes: set PRFAAS_LONG_TESTS=1"
)

K_PROMPT_TOKENS = 700
K_ENGINE = """
import json, sys
from sglang.srt.entrypoints.engine import Engine  # sglang.Engine
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args

def answer(engine, asked):
    try:
        said = engine.generate(**asked)
        for said in said if asked["stream"] else [said]:
            pass
        return {"finish": said["meta_info"]["finish_reason"]}
    except Exception as error:
        return {"status": getattr(error, "status_code", None), "detail": str(getattr(error, "detail", error))}

if __name__ == "__main__":
    load_plugins()
    engine = Engine(server_args=prepare_server_args(json.loads(sys.argv[1])))
    print("engine is up", flush=True)
    for line in sys.stdin:
        print("said " + json.dumps(answer(engine, json.loads(line))), flush=True)
"""


@pytest.fixture
def east(start_own: Any, tmp_path: Path) -> Iterator[SglangServer]:
    """Asks for its requests' places within a millisecond, in which no link has one."""
    link = {"peer_site": "test", "admission": {"nominal_bps": 10e6, "probe_every_s": 600}}
    pump = {"site": "east", "control_socket": str(tmp_path / "pump.sock"), "idle_exit_s": 20, "links": [link]}
    path = tmp_path / "prfaas.yaml"
    path.write_text(
        yaml.safe_dump({"pump": pump, "admission": {"within_s": 0.001, "may_queue": False}}), encoding="utf-8"
    )
    spec = replace(start_own.spec("dense", tmp_path / "west"), config_path=path)
    with SglangServer(spec, tmp_path / "east.log") as server:
        server.wait_ready()
        yield server


@pytest.mark.timeout(400)
def test_a_refusal_reaches_who_called_the_engine_with_its_status_code_and_when_to_ask_again(
    east: SglangServer, start_own: Any, tmp_path: Path
) -> None:
    config = tmp_path / "west" / "prfaas.yaml"
    spec = replace(east.spec, role="decode", host="127.0.0.1", port=start_own.ports(1)[0], config_path=config)
    flags = build_command(spec, sglang_python())[3:]
    script = tmp_path / "engine.py"
    script.write_text(K_ENGINE, encoding="utf-8")
    with (
        (tmp_path / "engine.log").open("wb") as log,
        subprocess.Popen(
            [str(sglang_python()), str(script), json.dumps(flags)],
            env=build_environment(spec, os.environ) | {K_OWNER: str(os.getpid())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            text=True,
        ) as engine,
    ):
        assert engine.stdin is not None
        assert engine.stdout is not None
        try:
            read_until(engine, "engine is up")
            for stream in (False, True):
                prompt = prompt_of(K_PROMPT_TOKENS, 90 + stream)
                sampling = {"temperature": 0, "max_new_tokens": 4}
                fields = {
                    "bootstrap_host": east.spec.host,
                    "bootstrap_port": east.spec.bootstrap_port,
                    "bootstrap_room": new_room(),
                }
                asked = {"input_ids": prompt, "sampling_params": sampling, "stream": stream, **fields}
                with concurrent.futures.ThreadPoolExecutor(1) as pool:
                    other = pool.submit(post, f"{east.url}/generate", asked, 60.0)
                    engine.stdin.write(json.dumps(asked) + "\n")
                    engine.stdin.flush()
                    said = json.loads(read_until(engine, "said "))
                    assert other.result()[0] == 503
                if stream:
                    finish = said["finish"]
                    assert (finish["type"], finish["status_code"]) == ("abort", 503)
                    assert finish["err_type"] == "prfaas_refused"
                    told = finish["message"]
                else:
                    assert said["status"] == 503
                    told = said["detail"]
                assert told.startswith("prfaas_refused: link to test: ")
                assert "retry_after_s=" in told
        finally:
            end_tree(engine)


def read_until(engine: subprocess.Popen[str], mark: str) -> str:
    """What follows the mark, in the first line that begins with it."""
    assert engine.stdout is not None
    for line in engine.stdout:
        if line.startswith(mark):
            return line.removeprefix(mark)
    pytest.fail("the engine ended: see engine.log")
