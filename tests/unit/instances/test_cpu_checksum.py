"""The checksum that CPU servers have in the place of SGLang's CUDA kernel."""

from __future__ import annotations

import importlib.util
import zlib
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas_testbed.instances.sglang_server import K_CPU_PATH


@pytest.fixture(scope="module")
def checksum() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cpu_checksum", K_CPU_PATH / "prfaas_cpu" / "checksum.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@given(rows=st.lists(st.integers(0, 19), max_size=30), length=st.integers(0, 40), seed=st.integers(0, 9))
def test_it_is_the_adler_32_of_the_items_one_after_the_other(
    checksum: ModuleType, rows: list[int], length: int, seed: int
) -> None:
    memory = np.random.default_rng(seed).integers(0, 256, (20, max(length, 1)), dtype=np.uint8)
    items = b"".join(memory[row, :length].tobytes() for row in rows) if length else b""
    found = checksum.adler32_of_items(int(memory.ctypes.data), length, rows, 77)
    assert found == zlib.adler32(items, 77)


def test_pages_come_before_states_and_one_wrong_byte_is_another_checksum(checksum: ModuleType) -> None:
    class Indices(np.ndarray):  # type: ignore[type-arg]
        def numpy(self) -> np.ndarray:  # type: ignore[type-arg]
            return np.asarray(self)

    pages, state = (np.random.default_rng(i).integers(0, 256, (9, 16), dtype=np.uint8) for i in (1, 2))
    computer = SimpleNamespace(
        _kv_data_ptrs=[pages.ctypes.data], _kv_item_lens=[16],
        _state_data_ptrs=[state.ctypes.data], _state_item_lens=[16],
    )  # fmt: skip
    of_pages, of_state = (np.array(rows).view(Indices) for rows in ([4, 2], [7]))
    whole = pages[[4, 2]].tobytes() + state[[7]].tobytes()
    assert checksum.compute(computer, of_pages, of_state) == zlib.adler32(whole)
    state[7, 3] ^= 1
    assert checksum.compute(computer, of_pages, of_state) != zlib.adler32(whole)
