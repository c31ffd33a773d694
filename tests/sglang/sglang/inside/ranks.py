"""By SGLang's own mapping: which of a prefill server's ranks a decode rank hears from, under which names, and
where a pipeline's stages put their layers. Says it as a line of JSON.
"""

import json
import sys
from itertools import product
from types import SimpleNamespace as Fields

from prfaas.sglang import compat


def manager(**fields):
    made = object.__new__(compat.MooncakeKVManager)
    vars(made).update(fields)
    return made


def senders_of(prefill, decode):
    tp, cp, pp = prefill
    info = Fields(
        attn_tp_size=tp,
        attn_cp_size=cp,
        pp_size=pp,
        enable_kv_cache_sharding=False,
        enable_dsa_cache_layer_split=False,
    )
    decode._resolve_rank_mapping(info)
    # Of latents each rank has all: one is chosen, the others hear of the room only.
    chosen = [info.target_tp_rank] if decode.is_mla_backend else info.target_tp_ranks
    names = [
        manager(attn_tp_rank=t, attn_cp_rank=c, pp_rank=p, pp_size=pp, attn_cp_size=cp)._prefill_unique_rank()
        for t in chosen
        for c in info.target_cp_ranks
        for p in info.target_pp_ranks
    ]
    return names, info.required_prefill_response_num


n, wrong = 0, []
for prefill in product((1, 2, 4), (1, 2), (1, 2, 4)):
    for tp, dp, pp, mla, all_cp in product((1, 2, 4), (1, 2), {1, prefill[2]}, (False, True), (False, True)):
        for rank, stage in product(range(tp * dp), range(pp)):
            decode = manager(
                kv_args=Fields(engine_rank=rank),
                attn_tp_size=tp,
                attn_cp_size=1,
                attn_cp_rank=0,
                pp_size=pp,
                pp_rank=stage,
                is_mla_backend=mla,
                is_hybrid_mla_backend=False,
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
sys.stdout.write(json.dumps([n, wrong[:3], stages]) + "\n")
