"""An SGLang plugin for the testbed's CPU servers: puts right the places where SGLang 0.5.23 takes a CUDA
build of torch for a GPU. Entered by the entry point in the dist-info folder beside this package; nothing here
reaches users."""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import Any

from prfaas_cpu import checksum
from prfaas_cpu.owner import end_with_owner

K_KDA = "PRFAAS_CPU_KDA"
"""Set for servers of models with Kimi delta attention, whose modules others needn't import."""
K_SCHEDULER = "sglang.srt.managers.scheduler"
K_LOOK_MS = 1
"""How often a server that waits for a transfer looks for its end."""
K_FORK = "PRFAAS_CPU_FORK"
"""Set: a server's processes are forked, not spawned."""
_loaded = False


def load_plugin() -> None:
    """Idempotent; does nothing on a server that isn't on a CPU. Only a scheduler computes: another process
    would import all that there is to be put right for nothing.
    """
    global _loaded
    from sglang.srt.utils import is_cpu

    if _loaded or not is_cpu():
        return
    _loaded = True
    end_with_owner()
    if os.environ.get(K_FORK):
        _fork_children()
    elif K_SCHEDULER not in sys.modules:
        return
    _choose_cpu_norms()
    _answer_device_module()
    _register_hooks()


def _fork_children() -> None:
    """Imports are nearly all of a start, and it is a GPU that forbids forking: here children go on with what
    their parent has imported, the scheduler's hooks among it, instead of importing the same anew.
    """
    set_start_method = multiprocessing.set_start_method

    def fork(method: str | None, force: bool = False) -> None:
        set_start_method("fork" if method == "spawn" else method, force)

    multiprocessing.set_start_method = fork
    os.register_at_fork(after_in_child=end_with_owner)


def _choose_cpu_norms() -> None:
    """Without AMX these modules would take the Triton path."""
    from sglang.kernels.ops.attention.fla import fused_norm_gate, layernorm_gated

    fused_norm_gate._use_cpu = layernorm_gated._use_cpu = True


def _answer_device_module() -> None:
    """A CUDA build of torch without a GPU answers torch.cuda; qwen3_next.py calls .current_device() on it."""
    import torch

    original = torch.get_device_module

    def get_device_module(device: Any = None) -> Any:
        if device is None or str(device).startswith("cpu"):
            return torch.cpu
        return original(device)

    torch.get_device_module = get_device_module


def _register_hooks() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add",
        fused_gate_sigmoid_mul_add,
        HookType.REPLACE,
    )
    # Tensor parallelism on CPU: a CUDA build of torch would build PyNccl on a CPU device.
    HookRegistry.register(
        "sglang.srt.distributed.parallel_state.GroupCoordinator.__init__", without_pynccl, HookType.BEFORE
    )
    # The stock Mooncake backend, our baseline: its sender asks for pinned memory and a CUDA event.
    HookRegistry.register(
        "sglang.srt.disaggregation.mooncake.conn.MooncakeKVSender.__init__",
        with_device_indices,
        HookType.BEFORE,
    )
    HookRegistry.register(f"{K_SCHEDULER}.Scheduler.on_idle", rest, HookType.AFTER)
    checksum.register(HookRegistry, HookType.REPLACE)
    if os.environ.get(K_KDA):
        from prfaas_cpu import kda

        kda.register(HookRegistry, HookType.REPLACE, HookType.AROUND)


def fused_gate_sigmoid_mul_add(
    hidden_states: Any,
    gate_weight: Any,
    shared_output: Any,
    final_hidden_states: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """final += sigmoid(hidden . gate) * shared, in place; SGLang's own is a Triton kernel."""
    import torch

    gate = torch.nn.functional.linear(hidden_states.float(), gate_weight.float().reshape(1, -1))
    final_hidden_states.add_((torch.sigmoid(gate) * shared_output.float()).to(final_hidden_states.dtype))
    return final_hidden_states


def rest(result: Any, scheduler: Any) -> None:
    """A scheduler with nothing to compute that waits for a transfer turns without a pause: a core each, which
    the other servers of this machine compute with. What a client sends wakes it at once."""
    if scheduler.idle_sleeper is not None:
        scheduler.idle_sleeper.poller.poll(K_LOOK_MS)


def without_pynccl(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return args, {**kwargs, "use_pynccl": False}


def with_device_indices(sender: Any, *args: Any, **kwargs: Any) -> None:
    sender.supports_host_tensor_indices = False
