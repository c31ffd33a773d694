"""KV in GPU memory: out of pages into pinned staging, through a pump, into other pages. Needs a GPU and
SGLang's environment (which has torch)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from prfaas_testbed.instances.sglang_server import sglang_python

pytestmark = pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no NVIDIA GPU on this machine")

K_ROUND_TRIP = """
import sys
import numpy as np
import torch
from prfaas.config.pump import PumpConfig
from prfaas.model.transfer import TransferKind
from prfaas.pump_client import LocalPumpClient
from prfaas.sglang.planning import Segments, page_pieces
from prfaas.sglang.staging import CudaMemory, Places, Staging

ITEM, PAGES = 4096, 256
torch.manual_seed(0)
source = torch.randint(1, 256, (PAGES, ITEM), dtype=torch.uint8, device="cuda:0")
target = torch.zeros_like(source)
torch.cuda.current_stream().synchronize()

config = {"site": "gpu", "control_socket": sys.argv[1], "idle_exit_s": 5}
pump = LocalPumpClient.open(PumpConfig.model_validate(config))
out, into = Staging(64 << 20, CudaMemory(0)), Staging(64 << 20, CudaMemory(0))
for staging in (out, into):
    pump.register([(staging.address, staging.size_bytes)])

order = np.random.default_rng(0).permutation(PAGES)
pages = page_pieces([target.data_ptr()], [ITEM], range(PAGES))
leased = into.take(int(pages[:, 1].sum()))
places = Places.from_bytes(Places.laid_out(pages, leased).to_bytes())
lease = pump.grant_lease(7, 1, [(leased, PAGES * ITEM)], 60.0)
u64 = lambda xs: np.asarray(list(xs), dtype=np.uint64)
plan = Segments(
    u64(source.data_ptr() + ITEM * i for i in range(PAGES)),
    u64(target.data_ptr() + ITEM * int(j) for j in order),
    u64(ITEM for _ in range(PAGES)),
)
staged = out.copy_out(plan, out.take(plan.total_bytes))
onto = places.translate(staged.destination, staged.length)
sent = pump.submit(
    lease.grant, staged.source, onto, staged.length, kind=TransferKind.KV, deadline_s=60.0, last=True
)
outcome = sent.wait(60.0)
assert outcome is not None and outcome.ok, outcome
assert lease.wait(60.0)
lease.revoke()
into.copy_in(places)
assert torch.equal(target[torch.as_tensor(order, device="cuda:0")], source)
pump.close()

# Slices, as unequal ranks send them: of each token's slot some bytes, between others'.
TOKENS, SLOT, SLICE = 4096, 256, 64
slots = torch.randint(0, 256, (TOKENS, SLOT), dtype=torch.uint8, device="cuda:0")
other = torch.zeros_like(slots)
torch.cuda.current_stream().synchronize()
plan = Segments(
    u64(slots.data_ptr() + SLICE + SLOT * t for t in range(TOKENS)),
    u64(other.data_ptr() + SLOT * t for t in range(TOKENS)),
    u64(SLICE for _ in range(TOKENS)),
)
staged = out.copy_out(plan, out.take(plan.total_bytes))
begin = int(staged.source[0]) - out.address
held = np.frombuffer(out._map, dtype=np.uint8)[begin : begin + TOKENS * SLICE].reshape(TOKENS, SLICE)
assert (held == slots[:, SLICE : 2 * SLICE].cpu().numpy()).all()
out.memory.copy_in(staged.source, staged.length, staged.destination)
assert torch.equal(other[:, :SLICE], slots[:, SLICE : 2 * SLICE])
assert not other[:, SLICE:].any()
print("equal")
"""


K_ORDER = """
import queue
from types import SimpleNamespace as Made
import numpy as np
import torch
from prfaas.sglang.layers import LayerWatch
from prfaas.sglang.planning import Segments
from prfaas.sglang.staging import CudaMemory, Staging

TOKENS, ITEM, LAYERS = 64, 512, 3
K_LONG_CYCLES = 1_000_000_000  # half a second and more
pool = [torch.zeros((TOKENS, ITEM), dtype=torch.uint8, device="cuda:0") for _ in range(2 * LAYERS)]
pages = torch.randperm(TOKENS, device="cuda:0")[:40].to(torch.int32)
req = Made(
    disagg_kv_sender=Made(bootstrap_room=7, curr_idx=0), pending_bootstrap=False, to_finish=None,
    origin_input_ids=[0] * 40, prefix_len=0, extend_end=40, start_send_idx=0, kv=Made(req_pool_idx=0),
    mamba_branching_seqlen=None, swa_branching_seqlen=None,
)
scheduler = Made(
    token_to_kv_pool_allocator=Made(page_size=1, translate_kv_indices_for_transfer=lambda tokens: tokens),
    req_to_token_pool=Made(req_to_token=pages.reshape(1, -1)),
)
batch = Made(forward_mode=Made(name="EXTEND"), reqs=[req], extend_num_tokens=40)
items = queue.Queue()
watch = LayerWatch(
    Made(kv_data_ptrs=[one.data_ptr() for one in pool], num_draft_entries=0), Made, lambda room: items, True
)
staging = Staging(8 << 20, CudaMemory(0))
torch.cuda.synchronize()

# As SGLang's scheduler: a pass is queued on a stream of its own, layer after layer, and nobody waits.
forward = torch.cuda.Stream()
watch.begin(scheduler, batch)
with torch.cuda.stream(forward):
    for layer in range(LAYERS):
        torch.cuda._sleep(K_LONG_CYCLES)
        for half in (layer, LAYERS + layer):
            pool[half][pages.long()] = half + 1
        watch.wrote((pool[layer].data_ptr(), pool[LAYERS + layer].data_ptr()), 40)
watch.end()

# As a worker: what it is told, in order; a layer's pages are copied once its event has come.
ahead = items.get_nowait()
ahead.event.synchronize()
told = ahead.pages.numpy()
assert (told == pages.cpu().numpy()).all(), (told, pages)
seen = []
u64 = lambda xs: np.asarray(list(xs), dtype=np.uint64)
for layer in range(LAYERS):
    pass_ = items.get_nowait()
    written = pass_.written[layer]
    assert not written.event.query(), "the kernels were through before anyone looked: make them longer"
    written.event.synchronize()
    for half in written.buffers:
        plan = Segments(
            u64(pool[half].data_ptr() + ITEM * int(page) for page in told), u64([0] * 40), u64([ITEM] * 40)
        )
        address = staging.take(plan.total_bytes)
        staging.copy_out(plan, address)
        begin = address - staging.address
        held = np.frombuffer(staging._map, dtype=np.uint8)[begin : begin + plan.total_bytes]
        assert (held == half + 1).all(), (layer, half, held[:8])
        seen.append(half)
        staging.give(address)
assert sorted(seen) == list(range(2 * LAYERS)), seen
print("equal")
"""

K_AGAIN = """
from prfaas.sglang.staging import CudaMemory, Staging

places = set()
for _ in range(4):
    staging = Staging(64 << 20, CudaMemory(0))
    places.add(staging.address)
    staging.close()
    del staging
# Memory that goes is given out again at the same place, and pinned already it couldn't be pinned.
assert len(places) < 4, places
print("equal")
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(K_ROUND_TRIP, id="pages that go by way of pinned memory arrive as they were"),
        pytest.param(K_ORDER, id="a layer's pages are copied after the kernels that write them"),
        pytest.param(K_AGAIN, id="staging can be made anew, as at a change of roles"),
    ],
)
def test_on_a_gpu(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(sglang_python()), "-c", script, str(tmp_path / "pump.sock")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "equal"
