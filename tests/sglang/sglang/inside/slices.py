"""SGLang's mapping of slices between unequal ranks, planned from its own arrays and from ours. Says how many
there were, which differed and what it was handed, as a line of JSON.
"""

import json
import sys
from itertools import product
from types import SimpleNamespace as Fields

import numpy as np

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
    args = Fields(
        kv_item_lens=[item] * 4,
        kv_data_ptrs=[1 << 20, 2 << 20, 3 << 20, 4 << 20],
        kv_layer_ids=[],
        page_size=page,
        total_kv_head_num=K_HEADS,
        engine_rank=rank,
        prefill_start_layer=0,
    )
    vars(made).update(kv_args=args, attn_tp_size=prefill_tp, pp_size=1, engine=Engine(None, "h:1"))
    peers = [5 << 20, 6 << 20, 7 << 20, 8 << 20]
    with made.engine.recording() as recorder:
        failed = made.send_kvcache_slice(
            "peer",
            have,
            peers,
            wanted,
            to_rank,
            decode_tp,
            page * K_HEADS // decode_tp * K_HEAD_BYTES,
            InlineExecutor(),
            [],
        )
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
sys.stdout.write(json.dumps([n, wrong, sorted(set(asked))]) + "\n")
