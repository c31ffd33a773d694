"""What a change of role takes on real SGLang servers: two of them trade places, and serve before and after.

A round: prefill and decode both change, and the same prompt is answered by the new pair; then both change
back. Each change is asked for with nothing on the server, and timed from the question to the answer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prfaas.model.errors import PrfaasError
from prfaas_testbed.experiment.fleet import K_MODELS_DIR
from prfaas_testbed.experiment.profiling import K_HOST, free_ports, undisturbed
from prfaas_testbed.experiment.sites import write_json
from prfaas_testbed.instances.models import TinyModel
from prfaas_testbed.instances.sglang_client import Pair, post, prompt_of
from prfaas_testbed.instances.sglang_server import K_SAME_CHUNKS, ServerSpec, SglangServer

K_SWITCH_ARGS = ("--enable-pd-role-switch", "--disaggregation-decode-retraction-backup", "cpu_tensor")
K_ROUNDS = 3
K_PROMPT_TOKENS = 300
K_OUTPUT_TOKENS = 8
K_SWITCH_TIMEOUT_S = 120.0
K_IDLE_WITHIN_S = 30.0
K_AGAIN_S = 0.1


@dataclass
class Switches:
    """Raw values, a row a change of role."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """`round`, `server`, `role`, `seconds`, and `asked`: questions until the server was idle."""
    answers: int = 0
    """Given by pairs in their first roles and in traded ones."""
    tokens_equal: bool = True
    """All of these answers had the first one's tokens."""

    def median_s(self, role: str) -> float:
        return float(statistics.median(row["seconds"] for row in self.rows if row["role"] == role))

    def section(self) -> dict[str, Any]:
        """A profile's `role_switch:`."""
        return {
            "to_prefill_s": round(self.median_s("prefill"), 4),
            "to_decode_s": round(self.median_s("decode"), 4),
            "source": "measured",
        }


def measure_role_switch(
    model: TinyModel, folder: Path, progress: Callable[[str], None], rounds: int = K_ROUNDS
) -> Switches:
    """Raises PrfaasError where a server refuses to change, or dies."""
    folder.mkdir(parents=True, exist_ok=True)
    pump, *ports = free_ports(5)
    here = {"site": "here", "listen": f"{K_HOST}:{pump}", "control_socket": str(folder / "pump.sock")}
    config = write_json(folder / "prfaas.yaml", {"pump": {**here, "idle_exit_s": 20}})
    servers = {}
    for place, (name, role) in enumerate((("first", "prefill"), ("second", "decode"))):
        spec = ServerSpec(
            role=role,  # type: ignore[arg-type]
            model=model, model_dir=K_MODELS_DIR / model.name, host=K_HOST, port=ports[2 * place],
            bootstrap_port=ports[2 * place + 1], config_path=config,
            extra_args=(*K_SAME_CHUNKS, *K_SWITCH_ARGS),
        )  # fmt: skip
        servers[name] = SglangServer(spec, folder / f"{name}.log")
    found = Switches()
    with undisturbed(progress):
        try:
            for server in servers.values():
                server.start()
            for server in servers.values():
                server.wait_ready(progress=progress)
            first, second = servers["first"], servers["second"]
            wanted = _serve(first, second)
            found.answers = 1
            for number in range(rounds):
                for prefill, decode in ((second, first), (first, second)):
                    for server, role in ((prefill, "prefill"), (decode, "decode")):
                        name = "first" if server is first else "second"
                        row = {"round": number, "server": name, "role": role, **_switch(server, role)}
                        found.rows.append(row)
                        progress(f"{name} turned to {role} in {row['seconds']:.3f} s")
                    found.answers += 1
                    found.tokens_equal &= _serve(prefill, decode) == wanted
        finally:
            for server in servers.values():
                server.stop()
    return found


def _serve(prefill: SglangServer, decode: SglangServer) -> list[int]:
    pair = Pair(prefill.url, decode.url, K_HOST, prefill.spec.bootstrap_port or 0)
    _, answer = pair.generate(prompt_of(K_PROMPT_TOKENS, 1), K_OUTPUT_TOKENS)
    if answer.error is not None:
        raise PrfaasError(f"the pair didn't answer: {answer.error}")
    return answer.tokens


def _switch(server: SglangServer, role: str) -> dict[str, Any]:
    """Seconds from the question that was granted to its answer. SGLang refuses while anything is left on it,
    as for a moment after an answer: that isn't counted."""
    end, asked = time.monotonic() + K_IDLE_WITHIN_S, 0
    while True:
        asked, began_s = asked + 1, time.monotonic()
        body = {"new_role": role, "decode_cuda_graph_memory_gb": 0.0}
        status, said = post(f"{server.url}/pd_role_switch", body, K_SWITCH_TIMEOUT_S)
        seconds = time.monotonic() - began_s
        if status == 200 and isinstance(said, dict) and said.get("success"):
            return {"seconds": round(seconds, 4), "asked": asked}
        if "idle" not in str(said) or time.monotonic() > end:
            raise PrfaasError(f"{server.spec.role} server didn't turn to {role}: {status} {str(said)[:300]}")
        time.sleep(K_AGAIN_S)
