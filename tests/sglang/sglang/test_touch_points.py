"""The SGLang that is pinned is the one the backend is made for, and one that moved ends a launch at once."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from prfaas.sglang import compat
from prfaas_testbed.instances.models import K_MODELS
from prfaas_testbed.instances.sglang_server import (
    K_CHECKOUT,
    K_CPU_PATH,
    ServerDied,
    ServerSpec,
    SglangServer,
    sglang_python,
)


def run_python(
    script: str, *argv: str, path: str = "", config: Path | None = None
) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    env |= {
        "PYTHONPATH": os.pathsep.join(filter(None, (path, str(K_CPU_PATH)))),
        "SGLANG_USE_CPU_ENGINE": "1",
    }
    if config is not None:
        env["PRFAAS_CONFIG"] = str(config)
    return subprocess.run(
        [str(sglang_python()), "-W", "ignore", "-c", script, *argv],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_every_touch_point_is_in_the_pinned_version() -> None:
    done = run_python(
        "from prfaas.sglang import compat; compat.check_backend(); print(compat.installed_version())"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == compat.K_VERSION


K_HOOKS = """
def hooks_of_ours():
    from sglang.srt.plugins.hook_registry import HookRegistry as registry
    hooks = {t: [getattr(h, "__module__", "") for _, h, _ in found] for t, found in registry._hooks.items()}
    return {t: ours for t, all in hooks.items() if (ours := [m for m in all if m.startswith("prfaas.")])}
"""
K_HANDS_ON = {compat.K_GET_KV_CLASS: ["prfaas.sglang.plugin"]}

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


def test_plugin_loads_once_however_often_and_leaves_other_backends_alone() -> None:
    done = run_python(K_HOOKS + K_LOAD, "--disaggregation-transfer-backend", "prfaas")
    assert done.returncode == 0, done.stderr[-2000:]
    classes, hooks = done.stdout.strip().splitlines()[-2:]
    assert classes.split() == ["prfaas.sglang.backend", "sglang.srt.disaggregation.mooncake.conn"]
    answering = (compat.K_PREPARE_ABORT, compat.K_HANDLE_ABORT, compat.K_SERVE_HTTP)
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


def test_each_of_several_http_workers_knows_the_backend_and_answers_refusals() -> None:
    worker = K_HOOKS.replace("def hooks_of_ours", "global hooks_of_ours\ndef hooks_of_ours") + K_WORKER
    flags = ("--disaggregation-transfer-backend", "prfaas", "--tokenizer-worker-num", "2")
    done = run_python("import sys\n" + K_WORKERS, *flags, worker)
    assert done.returncode == 0, done.stderr[-2000:]
    knows, hooks = done.stdout.strip().splitlines()[-2:]
    assert knows.startswith("prfaas ['RefusalAnswers'")  # around all others
    assert json.loads(hooks)[compat.K_HANDLE_ABORT] == ["prfaas.sglang.answers"]


K_WITHOUT = """
import json, sys
from sglang.srt.disaggregation import utils  # as a scheduler has, before its plugins load
from sglang.srt.plugins import load_plugins; load_plugins()
print(json.dumps(sorted(m for m in sys.modules if m.startswith(('prfaas.', 'crc32c')))))
print(json.dumps(hooks_of_ours()))
"""


def test_server_without_the_backend_imports_none_of_it_and_has_one_hook_that_hands_on() -> None:
    done = run_python(K_HOOKS + K_WITHOUT, "--disaggregation-transfer-backend", "mooncake")
    assert done.returncode == 0, done.stderr[-2000:]
    modules, hooks = (json.loads(line) for line in done.stdout.strip().splitlines()[-2:])
    assert modules == [
        "prfaas.model",
        "prfaas.model.errors",
        "prfaas.sglang",
        "prfaas.sglang.command_line",
        "prfaas.sglang.compat",
        "prfaas.sglang.plugin",
    ]
    assert hooks == K_HANDS_ON


K_POOLS = """
import json
from types import SimpleNamespace as Fields
import torch
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.mem_cache.memory_pool import (
    HybridLinearKVPool, KVWriteLoc, MHATokenToKVPool, MLATokenToKVPool,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.runtime_context import get_parallel
from prfaas.sglang import layers
get_parallel().override_permanently(dcp_enabled=False, dcp_size=1, attn_dcp_size=1, attn_dcp_rank=0)
common = dict(size=16, page_size=1, dtype=torch.bfloat16, device="cpu", enable_memory_saver=False)
heads, latents = dict(head_num=2, head_dim=8), dict(kv_lora_rank=8, qk_rope_head_dim=4)
hybrid = dict(full_attention_layer_ids=[1, 3], mamba_pool=None, **heads, **common)
window = dict(size_swa=8, swa_attention_layer_ids=[0, 2], full_attention_layer_ids=[1, 3], **heads, **common)
pools = {
    "mha": (MHATokenToKVPool(layer_num=3, **heads, **common), [0, 1, 2]),
    "mla": (MLATokenToKVPool(layer_num=3, **latents, **common), [0, 1, 2]),
    "mla in parts": (MLATokenToKVPool(layer_num=3, **latents, **common), [0, 1, 2]),
    "hybrid": (HybridLinearKVPool(**hybrid), [1, 3]),
    "hybrid mla": (HybridLinearKVPool(use_mla=True, **latents, **hybrid), [1, 3]),
    "window": (SWAKVPool(**window), [0, 1, 2, 3]),
}
said, loc = {}, torch.tensor([3, 5, 6])
for name, (pool, layer_ids) in pools.items():
    args = Fields(kv_data_ptrs=pool.get_contiguous_buf_infos()[0])
    watch, forward = layers.LayerWatch(args, object, lambda room: None, False), Fields(written=[])
    watch._n_tokens, watch._forwards = 3, [(Fields(put=lambda forward: None), forward)]
    layers.use(watch)
    for layer_id in layer_ids:
        layer, row = Fields(layer_id=layer_id), (1, 12) if "mla" in name else (2, 8)
        k = torch.ones(3, *row, dtype=torch.bfloat16)
        if "parts" in name:
            pool.set_mla_kv_buffer(layer, loc, k[..., :8], k[..., 8:])
        else:
            pool.set_kv_buffer(layer, KVWriteLoc(loc, loc), k, k)
    said[name] = [list(one.buffers) for one in forward.written]
print(json.dumps(said))
"""


def test_each_kind_of_pool_tells_which_of_its_buffers_a_layer_has_filled(tmp_path: Path) -> None:
    """In order of the layers: of keys and values, or of latents. A sliding window's layers are state, and
    tell nothing."""
    flags = ("--disaggregation-transfer-backend", "prfaas", "--disaggregation-mode", "prefill")
    config = tmp_path / "prfaas.yaml"
    config.write_text("overlap: layer\npump: {site: test, control_socket: p.sock, idle_exit_s: 1}\n")
    done = run_python(K_POOLS, *flags, config=config)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "mha": [[0, 3], [1, 4], [2, 5]],
        "mla": [[0], [1], [2]],
        "mla in parts": [[0], [1], [2]],
        "hybrid": [[0, 2], [1, 3]],
        "hybrid mla": [[0], [1]],
        "window": [[0, 2], [1, 3]],
    }


K_RANKS = """
import json
from itertools import product
from types import SimpleNamespace as Fields
from sglang.srt.plugins import load_plugins
load_plugins()
from prfaas.sglang import compat

def manager(**fields):
    made = object.__new__(compat.MooncakeKVManager)
    vars(made).update(fields)
    return made

def senders_of(prefill, decode):
    tp, cp, pp = prefill
    info = Fields(attn_tp_size=tp, attn_cp_size=cp, pp_size=pp, enable_kv_cache_sharding=False,
                  enable_dsa_cache_layer_split=False)
    decode._resolve_rank_mapping(info)
    # Of latents each rank has all: one is chosen, the others hear of the room only.
    chosen = [info.target_tp_rank] if decode.is_mla_backend else info.target_tp_ranks
    names = [
        manager(attn_tp_rank=t, attn_cp_rank=c, pp_rank=p, pp_size=pp, attn_cp_size=cp)._prefill_unique_rank()
        for t in chosen for c in info.target_cp_ranks for p in info.target_pp_ranks
    ]
    return names, info.required_prefill_response_num

n, wrong = 0, []
for prefill in product((1, 2, 4), (1, 2), (1, 2, 4)):
    for tp, dp, pp, mla, all_cp in product((1, 2, 4), (1, 2), {1, prefill[2]}, (False, True), (False, True)):
        for rank, stage in product(range(tp * dp), range(pp)):
            decode = manager(
                kv_args=Fields(engine_rank=rank), attn_tp_size=tp, attn_cp_size=1, attn_cp_rank=0,
                pp_size=pp, pp_rank=stage, is_mla_backend=mla, is_hybrid_mla_backend=False,
                enable_all_cp_ranks_for_transfer=all_cp,
            )
            names, expected = senders_of(prefill, decode)
            n += 1
            if not len(set(names)) == len(names) == expected:
                wrong.append([prefill, tp, dp, pp, mla, all_cp, rank, stage, names, expected])

theirs, stages = list(range(100, 116)), []
for stage in range(4):
    args = Fields(prefill_start_layer=2 * stage)
    ours = [1000 * stage + i for i in range(4)]
    k, v, to_k, to_v, layers = manager(kv_args=args).get_mha_kv_ptrs_with_pp(ours, theirs)
    assert (len(k), len(v), layers) == (2, 2, 2)
    stages.append([to_k, to_v])
print(json.dumps([n, wrong[:3], stages]))
"""


def test_a_lease_waits_for_as_many_senders_as_sglang_maps_to_it_each_under_a_name_of_its_own() -> None:
    """Whatever tensor, context and pipeline parallelism prefill has, and whatever decode has of tensor and
    pipeline parallelism and DP attention; and a pipeline's stages fill each of decode's layers once."""
    done = run_python(K_RANKS)
    assert done.returncode == 0, done.stderr[-2000:]
    n, wrong, stages = json.loads(done.stdout.splitlines()[-1])
    assert n > 1000
    assert wrong == []
    assert [to_k for to_k, _ in stages] == [[100 + 2 * i, 101 + 2 * i] for i in range(4)]
    assert [to_v for _, to_v in stages] == [[108 + 2 * i, 109 + 2 * i] for i in range(4)]


K_SLICES = """
import json
from itertools import product
from types import SimpleNamespace as Fields
import numpy as np
from sglang.srt.plugins import load_plugins
load_plugins()
from prfaas.sglang import compat
from prfaas.sglang.planning import Column, InlineExecutor, RecordingEngine

K_HEADS, K_HEAD_BYTES = 4, 32
asked = []

class Engine(RecordingEngine):
    def batch_transfer_sync(self, session_id, source, destination, length):
        asked.append(type(source).__name__)
        return super().batch_transfer_sync(session_id, source, destination, length)

def planned(page, prefill_tp, rank, decode_tp, to_rank, have, wanted):
    made = object.__new__(compat.MooncakeKVManager)
    item = page * K_HEADS // prefill_tp * K_HEAD_BYTES
    args = Fields(kv_item_lens=[item] * 4, kv_data_ptrs=[1 << 20, 2 << 20, 3 << 20, 4 << 20], kv_layer_ids=[],
                  page_size=page, total_kv_head_num=K_HEADS, engine_rank=rank, prefill_start_layer=0)
    vars(made).update(kv_args=args, attn_tp_size=prefill_tp, pp_size=1, engine=Engine(None, "h:1"))
    peers = [5 << 20, 6 << 20, 7 << 20, 8 << 20]
    with made.engine.recording() as recorder:
        failed = made.send_kvcache_slice("peer", have, peers, wanted, to_rank, decode_tp,
                                         page * K_HEADS // decode_tp * K_HEAD_BYTES, InlineExecutor(), [])
    assert not failed
    found = recorder.segments()
    return [column.tolist() for column in (found.source, found.destination, found.length)]

rng, wrong, n = np.random.default_rng(1), [], 0
for page, (prefill_tp, decode_tp) in product((1, 16), ((2, 1), (1, 2), (4, 2), (2, 4))):
    for rank, to_rank in product(range(prefill_tp), range(decode_tp)):
        have, wanted = (rng.permutation(64)[:9].astype(np.int32) for _ in "ab")
        case = (page, prefill_tp, rank, decode_tp, to_rank)
        plain = planned(*case, have, wanted)
        ours = planned(*case, have.view(Column), wanted.view(Column))
        n += len(plain[0])
        if plain != ours:
            wrong.append(case)
print(json.dumps([n, wrong, sorted(set(asked))]))
"""


def test_slices_of_unequal_ranks_are_mapped_alike_without_a_list_of_each_tokens() -> None:
    done = run_python(K_SLICES)
    assert done.returncode == 0, done.stderr[-2000:]
    n, wrong, kinds = json.loads(done.stdout.splitlines()[-1])
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


@pytest.fixture
def doctored(tmp_path: Path) -> Path:
    """A folder that, first on the path, makes of SGLang one that has lost a method."""
    (tmp_path / "sitecustomize.py").write_text(K_DOCTOR)
    return tmp_path


def test_launch_on_an_sglang_that_moved_fails_at_once_and_says_what_was_expected(doctored: Path) -> None:
    spec = ServerSpec(
        role="prefill",
        model=K_MODELS["dense"],
        model_dir=K_CHECKOUT / ".cache" / "models" / "dense",
        host="127.0.0.1",
        port=1,
        bootstrap_port=2,
        extra_env={"PYTHONPATH": os.pathsep.join((str(doctored), str(K_CPU_PATH)))},
    )
    with SglangServer(spec, doctored / "server.log") as server:
        with pytest.raises(ServerDied) as caught:
            server.wait_ready(timeout_s=300)
        assert "MooncakeKVManager: expected a method maybe_send_extra, found NoneType" in str(caught.value)
        assert f"made for SGLang {compat.K_VERSION}" in str(caught.value)


def test_file_that_is_wrong_ends_the_launch_with_file_field_and_value(tmp_path: Path) -> None:
    config = tmp_path / "prfaas.yaml"
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
    with SglangServer(spec, tmp_path / "server.log") as server:
        with pytest.raises(ServerDied) as caught:
            server.wait_ready(timeout_s=300)
        assert f"prfaas: {config}: pump.max_streams: found 0" in str(caught.value)
