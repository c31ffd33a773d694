"""Which of its buffers each kind of pool has filled, as the hooks hear it layer by layer: a line of JSON."""

import json
import sys
from types import SimpleNamespace as Fields

import torch
from sglang.srt.mem_cache.memory_pool import (
    HybridLinearKVPool,
    KVWriteLoc,
    MHATokenToKVPool,
    MLATokenToKVPool,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.runtime_context import get_parallel

from prfaas.sglang import layers

get_parallel().override_permanently(dcp_enabled=False, dcp_size=1, attn_dcp_size=1, attn_dcp_rank=0)
common = {"size": 16, "page_size": 1, "dtype": torch.bfloat16, "device": "cpu", "enable_memory_saver": False}
heads, latents = {"head_num": 2, "head_dim": 8}, {"kv_lora_rank": 8, "qk_rope_head_dim": 4}
hybrid = {"full_attention_layer_ids": [1, 3], "mamba_pool": None, **heads, **common}
window = {
    "size_swa": 8,
    "swa_attention_layer_ids": [0, 2],
    "full_attention_layer_ids": [1, 3],
    **heads,
    **common,
}
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
sys.stdout.write(json.dumps(said) + "\n")
