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
# A kernel still writes the pages when the copy is asked for: what leaves must be what it wrote.
big = torch.randn(4096, 4096, device="cuda:0")
for _ in range(50):
    big = big @ big.T / 64.0
source.add_((big.sum() * 0).to(torch.uint8))
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


def test_pages_on_a_gpu_arrive_as_they_were_written(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(sglang_python()), "-c", K_ROUND_TRIP, str(tmp_path / "pump.sock")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "equal"
