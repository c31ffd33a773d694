"""Sees, in a prefill server's scheduler, which pages a forward pass will fill and when a layer has filled
them.

Hooks on two of SGLang's functions: the scheduler's `run_batch`, around which a pass is known with its
requests, and the pools' `set_kv_buffer`, after which a layer's K and V of all the pass's tokens are written
(on a GPU: once the kernels so far have run, which an event says). What they see goes to the workers' queue;
nothing is planned, copied or sent in the scheduler's thread.

What isn't seen leaves with its chunk: layers of pools with a `set_kv_buffer` of their own (FP4, MXFP8,
unified memory), writes fused into a model's kernels or replayed from a CUDA graph, batches split in two,
draft models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from prfaas.sglang import compat, touch_points
from prfaas.sglang.ahead import Forward, RoomAhead, Written

logger = logging.getLogger(__name__)


class LayerWatch:
    """One a scheduler process. All methods are called in the scheduler's thread."""

    def __init__(
        self, kv_args: Any, sender_class: Any, queue_of: Callable[[int], Any | None], with_events: bool
    ) -> None:
        """`queue_of(room)`: where its worker takes what it has to do; None for a room that nobody waits for.
        `with_events`: pages are on a GPU."""
        targets = len(kv_args.kv_data_ptrs) - int(getattr(kv_args, "num_draft_entries", 0) or 0)
        self._buffers = {pointer: i for i, pointer in enumerate(kv_args.kv_data_ptrs[:targets])}
        self._sender_class, self._queue_of, self._with_events = sender_class, queue_of, with_events
        # Of the pass that runs now: what each queue's worker is told.
        self._n_tokens = 0
        self._forwards: list[tuple[Any, Forward]] = []

    def begin(self, scheduler: Any, batch: Any) -> None:
        """A pass is about to run."""
        if batch.forward_mode.name != "EXTEND":
            return
        by_queue: dict[int, tuple[Any, Forward]] = {}
        for req in batch.reqs:
            ahead = self._ahead_of(scheduler, req)
            queue = None if ahead is None else self._queue_of(ahead.room)
            if ahead is not None and queue is not None:
                by_queue.setdefault(id(queue), (queue, Forward()))[1].rooms.append(ahead)
                queue.put(ahead)
        self._n_tokens, self._forwards = int(batch.extend_num_tokens), list(by_queue.values())

    def _ahead_of(self, scheduler: Any, req: Any) -> RoomAhead | None:
        sender = req.disagg_kv_sender
        if not isinstance(sender, self._sender_class) or req.pending_bootstrap or req.to_finish is not None:
            return None
        page = scheduler.token_to_kv_pool_allocator.page_size
        whole = len(req.origin_input_ids)
        # What lies before has been handed over, or is about to be by SGLang. A page that an earlier chunk
        # began is this one's, one that this chunk doesn't fill the next one's; as SGLang has it.
        begin = max(req.prefix_len - req.prefix_len % page, req.start_send_idx)
        end = min(req.extend_end, whole)
        if end < whole:
            end -= end % page
        skipped = begin - req.start_send_idx
        if begin >= end or skipped % page or begin < _known_to_the_tree(req):
            return None
        raw = scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, begin:end]
        tokens = scheduler.token_to_kv_pool_allocator.translate_kv_indices_for_transfer(raw)
        pages, event = self._to_host(tokens[::page] // page)
        return RoomAhead(sender.bootstrap_room, sender.curr_idx + skipped // page, pages, event)

    def _to_host(self, pages: Any) -> tuple[Any, Any]:
        """As SGLang does for a chunk: the scheduler doesn't wait for the GPU, the worker does."""
        if not self._with_events:
            return pages.cpu().numpy(), None
        import torch

        host = torch.empty(pages.shape, dtype=pages.dtype, device="cpu", pin_memory=True)
        host.copy_(pages, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream())
        return host, event

    def wrote(self, pointers: tuple[int, ...], n_tokens: int) -> None:
        """A layer has written so many tokens to the buffers there."""
        # A batch that is run in halves writes fewer; padding makes it more.
        if not self._forwards or n_tokens < self._n_tokens:
            return
        buffers = tuple(i for p in pointers if (i := self._buffers.get(p)) is not None)
        if not buffers:
            return
        event = None
        if self._with_events:
            import torch

            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream())
        for queue, forward in self._forwards:
            forward.written.append(Written(buffers, event))
            queue.put(forward)

    def end(self) -> None:
        """The pass has run, or is in the GPU's queue."""
        self._forwards = []


def _known_to_the_tree(req: Any) -> int:
    """How many tokens the prefix tree has beyond those that their states let it use. SGLang computes them
    again, and then keeps the tree's pages: the ones that the pass fills are anybody's.
    """
    return max(req.mamba_branching_seqlen or 0, req.swa_branching_seqlen or 0)


_here: LayerWatch | None = None
"""This process's."""


def use(watch: LayerWatch | None) -> None:
    global _here
    _here = watch


def register_in_scheduler() -> None:
    around, after = compat.HookType.AROUND, compat.HookType.AFTER
    compat.HookRegistry.register(touch_points.K_RUN_BATCH, run_batch, around)
    compat.HookRegistry.register(touch_points.K_MHA_WRITE, mha_wrote, after)
    compat.HookRegistry.register(touch_points.K_MLA_WRITE, mla_wrote, after)
    compat.HookRegistry.register(touch_points.K_MLA_WRITE_PARTS, mla_wrote, after)


def run_batch(original: Any, scheduler: Any, batch: Any, *arguments: Any, **more: Any) -> Any:
    """SGLang's, with its layers watched."""
    watch = _here
    if watch is None:
        return original(scheduler, batch, *arguments, **more)
    _guarded(watch.begin, scheduler, batch)
    try:
        return original(scheduler, batch, *arguments, **more)
    finally:
        watch.end()


def mha_wrote(
    result: Any,
    pool: Any,
    layer: Any,
    loc_info: Any,
    *arguments: Any,
    layer_id_override: int | None = None,
    dcp_kv_mask: Any = None,
    **more: Any,
) -> None:
    """After a pool of keys and values has stored a layer's."""
    if _here is not None and dcp_kv_mask is None:
        _guarded(_wrote, _here, pool, layer, loc_info, layer_id_override, ("k_buffer", "v_buffer"))


def mla_wrote(
    result: Any,
    pool: Any,
    layer: Any,
    loc_info: Any,
    *arguments: Any,
    layer_id_override: int | None = None,
    **more: Any,
) -> None:
    """After a pool of latents has stored a layer's."""
    if _here is not None:
        _guarded(_wrote, _here, pool, layer, loc_info, layer_id_override, ("kv_buffer",))


def _wrote(
    watch: LayerWatch, pool: Any, layer: Any, loc_info: Any, layer_id: int | None, names: tuple[str, ...]
) -> None:
    index = (layer.layer_id if layer_id is None else layer_id) - pool.start_layer
    written = compat.unwrap_write_loc(loc_info)[0]
    watch.wrote(tuple(getattr(pool, name)[index].data_ptr() for name in names), written.shape[0])


def _guarded(call: Callable[..., None], *arguments: Any) -> None:
    """Watching must never cost a request: if it fails, chunks leave whole from then on."""
    try:
        call(*arguments)
    except Exception:
        logger.exception("prfaas: layers can't be seen here; KV leaves chunk by chunk")
        use(None)
