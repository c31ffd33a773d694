"""Every place where this package touches SGLang, and what it expects there.

Names alone: compat.py imports and checks them. What another module reads of SGLang's classes, and of what
they make, stands here; a test holds the modules to that.

To move the pin: change K_VERSION and pyproject's extra, run tests/sglang/sglang/test_touch_points.py, and
follow what it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prfaas.sglang.control import K_METADATA_FRAMES, K_REGISTRATION_FRAMES

K_VERSION = "0.5.23"
K_BACKEND = "prfaas"
K_GET_KV_CLASS = "sglang.srt.disaggregation.utils.get_kv_class"
K_BOOTSTRAP_ADDRESS = "sglang.srt.disaggregation.decode._bootstrap_addr"
K_PREPARE_ABORT = "sglang.srt.disaggregation.utils.prepare_abort"
K_HANDLE_ABORT = "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_abort_finish_reason"
K_SERVE_HTTP = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"
K_APP_PATH = "SGLANG_HTTP_SERVER_APP_PATH"
"""Names the application that each of several HTTP workers imports."""
K_RUN_BATCH = "sglang.srt.managers.scheduler.Scheduler.run_batch"
K_MHA_WRITE = "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.set_kv_buffer"
K_MLA_WRITE = "sglang.srt.mem_cache.memory_pool.MLATokenToKVPool.set_kv_buffer"
K_MLA_WRITE_PARTS = "sglang.srt.mem_cache.memory_pool.MLATokenToKVPool.set_mla_kv_buffer"

K_LINKER_FLAG = "--enable-unified-cache-external-linker"
K_LINKER_CONFIG = "--unified-cache-external-linker-config"

_COMMON = "sglang.srt.disaggregation.common.conn"
_MOONCAKE = "sglang.srt.disaggregation.mooncake.conn"
_POOLS = "sglang.srt.mem_cache.memory_pool"
_LINKER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker"


@dataclass(frozen=True)
class TouchPoint:
    """One name of SGLang's that prfaas uses, and what it relies on.

    `members` must exist on it; `attributes` on what a class makes, set by its methods or declared; `fields`
    are those of a dataclass; `methods` maps a method's name to parameters it must take; `parameters` are
    those of a function; `frames` maps a method that returns a message to its number of parts; `engine_calls`,
    of a class, are the only methods that its source may ask of `self.engine`.
    """

    module: str
    name: str
    members: tuple[str, ...] = ()
    methods: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    frames: Mapping[str, int] = field(default_factory=dict)
    fields: tuple[str, ...] = ()
    engine_calls: frozenset[str] = frozenset()

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


# What makes the flag legal and the class found; checked in every process that loads the plugin.
K_ENTRANCE: tuple[TouchPoint, ...] = (
    TouchPoint(
        "sglang.srt.arg_groups.choices", "add_disagg_transfer_backend_choices", parameters=("iterable",)
    ),
    TouchPoint("sglang.srt.arg_groups.choices", "DISAGG_TRANSFER_BACKEND_CHOICES"),
    TouchPoint(
        "sglang.srt.plugins.hook_registry",
        "HookRegistry",
        methods={"register": ("target", "hook", "hook_type"), "apply_hooks": ()},
    ),
    TouchPoint("sglang.srt.plugins.hook_registry", "HookType", members=("AROUND", "BEFORE", "AFTER")),
)

K_ENTRANCE_UTILS: tuple[TouchPoint, ...] = (
    TouchPoint(
        "sglang.srt.disaggregation.utils",
        "TransferBackend",
        members=("MOONCAKE", "_member_map_", "_value2member_map_", "_member_names_"),
    ),
    TouchPoint(
        "sglang.srt.disaggregation.utils",
        "KVClassType",
        members=("KVARGS", "MANAGER", "SENDER", "RECEIVER", "BOOTSTRAP_SERVER"),
    ),
    TouchPoint(
        "sglang.srt.disaggregation.utils", "get_kv_class", parameters=("transfer_backend", "class_type")
    ),
)

# What the backend's own classes stand on; checked when a server is started with the flag.
K_BACKEND_POINTS: tuple[TouchPoint, ...] = (
    TouchPoint(
        "sglang.srt.disaggregation.base.conn",
        "KVPoll",
        members=("Failed", "Bootstrapping", "WaitingForInput", "Transferring", "Success"),
    ),
    TouchPoint("sglang.srt.disaggregation.base.conn", "StateType", members=("MAMBA", "SWA")),
    TouchPoint("sglang.srt.disaggregation.utils", "DisaggregationMode", members=("PREFILL", "DECODE")),
    TouchPoint(
        _COMMON,
        "CommonKVManager",
        methods={
            "update_status": ("bootstrap_room", "status"),
            "check_status": ("bootstrap_room",),
            "record_failure": ("bootstrap_room", "failure_reason"),
            "conclude_transfer": ("bootstrap_room", "status", "targets", "failure_reason"),
            "conclude_failure": ("bootstrap_room", "failure_reason"),
            "apply_prefill_status": ("bootstrap_room", "status", "prefill_rank", "failure_reason"),
            "is_abort_release_safe": ("bootstrap_room", "required_acks"),
            "_make_worker_recv": ("socket", "timeout_ms"),
            "_prefill_unique_rank": (), "_room_notify_targets": ("bootstrap_room",),
            "try_ensure_parallel_info": ("bootstrap_addr",),
            "submit_prefill_recompute": ("kv_receiver", "payload"),
            "_send_multipart_locked": ("endpoint", "parts", "is_ipv6"),
            "_resolve_rebootstrap_prefill_url": ("kv_receiver",),
            "send_kv_status_message": ("targets", "bootstrap_room", "status", "failure_reason"),
        },
        members=("kv_status_msg_carries_reason",),
    ),
    TouchPoint(_COMMON, "PrefillServerInfo", fields=("prefill_http_port",)),
    TouchPoint(
        "sglang.srt.disaggregation.base.conn", "KVArgs",
        attributes=(
            "page_size", "kv_cache_dtype_str", "kv_data_ptrs", "kv_data_lens", "kv_item_lens",
            "num_draft_entries", "aux_data_ptrs", "aux_data_lens", "aux_item_lens", "state_types",
            "state_data_ptrs", "state_data_lens", "state_item_lens", "gpu_id", "ib_device",
        ),
    ),
    TouchPoint("sglang.srt.server_args", "ServerArgs", attributes=("device", "served_model_name", "port")),
    TouchPoint(
        _MOONCAKE,
        "MooncakeKVManager",
        methods={
            "init_engine": (),
            "register_buffer_to_engine": (),
            "deregister_buffer_to_engine": (),
            "teardown": (),
            "transfer_worker": ("queue", "executor", "staging_buffer", "worker_index"),
            "send_kvcache": (
                "mooncake_session_id", "prefill_kv_indices", "dst_kv_ptrs", "dst_kv_indices", "executor",
                "dst_layer_ids", "dst_device_kv_indices", "dst_kv_item_len", "dst_attn_tp_size",
            ),
            "send_kvcache_slice": (
                "mooncake_session_id", "prefill_kv_indices", "dst_kv_ptrs", "dst_kv_indices", "dst_tp_rank",
                "dst_attn_tp_size", "dst_kv_item_len", "executor", "dst_layer_ids",
            ),
            "maybe_send_extra": (
                "req", "prefill_state_indices", "executor", "target_rank_registration_info",
            ),
            "send_aux": ("req", "prefill_aux_index", "dst_aux_ptrs"),
            "add_transfer_request": ("bootstrap_room", "kv_indices", "index_slice", "is_last_chunk"),
            "build_receiver_registration_message": (),
            "build_receiver_metadata_message": (
                "bootstrap_room", "required_dst_info_num", "kv_indices", "aux_index", "state_indices",
                "decode_prefix_len", "is_dummy",
            ),
            "_get_dsa_cache_transfer_skip_flags": ("info",),
        },
        attributes=(
            "kv_args", "server_args", "disaggregation_mode", "attn_tp_size", "is_mla_backend",
            "is_hybrid_mla_backend", "local_ip", "rank_port", "bootstrap_host", "bootstrap_port",
            "request_status", "failure_records", "failure_lock", "transfer_infos", "transfer_queues",
            "decode_kv_args_table", "prefill_info_table", "required_prefill_response_num_table",
            "addr_to_rooms_tracker", "engine",
        ),
        frames={
            "build_receiver_registration_message": K_REGISTRATION_FRAMES,
            "build_receiver_metadata_message": K_METADATA_FRAMES,
        },
        engine_calls=frozenset(
            {"batch_register", "batch_deregister", "batch_transfer_sync", "get_session_id", "send_probe"}
        ),
    ),
    TouchPoint(
        _MOONCAKE, "MooncakeKVSender",
        members=("supports_host_tensor_indices",),
        attributes=("kv_mgr", "bootstrap_room", "curr_idx"),
        methods={"abort": (), "clear": (), "poll": (), "failure_exception": ()},
    ),
    TouchPoint(
        _MOONCAKE, "MooncakeKVReceiver",
        attributes=("kv_mgr", "bootstrap_room", "bootstrap_addr"),
        methods={
            "abort": (), "clear": (), "poll": (), "failure_exception": (),
            "send_metadata": ("kv_indices", "aux_index", "state_indices", "decode_prefix_len"),
            "ensure_abort_notified": (), "_connect": ("endpoint", "is_ipv6"),
            "disconnect_endpoint": ("endpoint",),
        },
    ),
    TouchPoint(_MOONCAKE, "MooncakeKVBootstrapServer"),
    TouchPoint(
        _MOONCAKE, "TransferInfo",
        fields=(
            "room", "endpoint", "dst_port", "mooncake_session_id", "dst_kv_indices", "dst_aux_index",
            "dst_state_indices", "required_dst_info_num", "is_dummy", "decode_prefix_len",
        ),
    ),
    TouchPoint(
        _MOONCAKE, "KVArgsRegisterInfo",
        fields=(
            "dst_kv_ptrs", "dst_aux_ptrs", "dst_state_data_ptrs", "dst_tp_rank", "dst_attn_tp_size",
            "dst_kv_item_len", "dst_kv_layer_ids", "requires_dcp_relayout",
        ),
    ),
    TouchPoint(
        "sglang.srt.disaggregation.common.utils", "TransferKVChunk",
        fields=(
            "room", "prefill_kv_indices", "index_slice", "is_last_chunk", "prefill_aux_index",
            "state_indices", "wait_event", "indices_event",
        ),
    ),
    TouchPoint("sglang.srt.utils.network", "get_local_ip_auto"),
    TouchPoint("sglang.srt.disaggregation.decode", "_bootstrap_addr", parameters=("req",)),
    TouchPoint(
        "sglang.srt.disaggregation.utils", "prepare_abort", parameters=("req", "error_message", "status_code")
    ),
    TouchPoint(
        "sglang.srt.managers.schedule_batch", "FINISH_ABORT",
        methods={"__init__": ("message", "status_code", "err_type"), "to_json": ()},
        attributes=("err_type",),
    ),
)  # fmt: skip

# What the stock engine is started by, for prefill servers of the same site; checked where there are any.
K_NEAR_POINTS: tuple[TouchPoint, ...] = (
    TouchPoint(
        "sglang.srt.distributed.device_communicators.mooncake_transfer_engine",
        "init_mooncake_transfer_engine",
        parameters=("hostname", "gpu_id", "ib_device"),
    ),
    TouchPoint(
        _MOONCAKE,
        "MooncakeKVManager",
        methods={"__init__": ("args", "disaggregation_mode", "server_args", "is_mla_backend")},
    ),
    TouchPoint(
        _MOONCAKE,
        "MooncakeKVReceiver",
        methods={"__init__": ("mgr", "bootstrap_addr", "bootstrap_room")},
    ),
)

# What layers are seen by as they finish; checked with the others.
K_LAYER_POINTS: tuple[TouchPoint, ...] = (
    TouchPoint(
        "sglang.srt.managers.scheduler", "Scheduler",
        methods={"run_batch": ("batch",)},
        attributes=("req_to_token_pool", "token_to_kv_pool_allocator"),
    ),
    TouchPoint(
        "sglang.srt.managers.schedule_batch", "ScheduleBatch",
        attributes=("reqs", "forward_mode", "extend_num_tokens"),
    ),
    TouchPoint(
        "sglang.srt.managers.schedule_batch", "Req",
        attributes=(
            "disagg_kv_sender", "pending_bootstrap", "to_finish", "origin_input_ids", "prefix_len",
            "extend_end", "start_send_idx", "kv", "mamba_branching_seqlen", "swa_branching_seqlen",
            "finished_reason",
        ),
    ),
    TouchPoint("sglang.srt.managers.schedule_batch", "ReqKvInfo", attributes=("req_pool_idx",)),
    TouchPoint("sglang.srt.model_executor.forward_batch_info", "ForwardMode", members=("EXTEND",)),
    TouchPoint(_POOLS, "ReqToTokenPool", attributes=("req_to_token",)),
    TouchPoint(
        "sglang.srt.mem_cache.allocator.base", "BaseTokenToKVPoolAllocator",
        methods={"translate_kv_indices_for_transfer": ()},
        attributes=("page_size",),
    ),
    TouchPoint(
        _POOLS, "MHATokenToKVPool",
        methods={"set_kv_buffer": ("layer", "loc_info", "layer_id_override", "dcp_kv_mask")},
        attributes=("k_buffer", "v_buffer", "start_layer"),
    ),
    TouchPoint(
        _POOLS, "MLATokenToKVPool",
        methods={
            "set_kv_buffer": ("layer", "loc_info", "layer_id_override"),
            "set_mla_kv_buffer": ("layer", "loc_info", "layer_id_override"),
        },
        attributes=("kv_buffer", "start_layer"),
    ),
    TouchPoint(_POOLS, "unwrap_write_loc", parameters=("loc_info",)),
    TouchPoint("sglang.srt.layers.radix_attention", "RadixAttention", attributes=("layer_id",)),
)  # fmt: skip

# What a server's prefixes are kept and given by; checked where its configuration has `prefixes:`.
K_PREFIX_POINTS: tuple[TouchPoint, ...] = (
    TouchPoint(
        _LINKER, "UnifiedCacheLinker",
        methods={
            "lookup": ("rid", "transfers"), "load": ("rid", "transfers"), "cancel_queued_load": ("rid",),
            "start_layer_wise_loading": (), "finish_layer_wise_loading": ("counter_index",),
            "offload": ("transfers", "session_id"), "num_completed_offloads": (),
            "pop_completed_offload": (), "reset": (), "close": (), "record_offload_ready": (),
        },
        members=("forward_stream",),
    ),
    TouchPoint(
        _LINKER, "LayerWiseLoadCounter",
        methods={
            "update_producer": (), "complete": ("index", "layer"), "fail": ("index", "error"),
            "finish": ("index",), "reset": (),
        },
        attributes=("num_layers",),
    ),
    TouchPoint("sglang.srt.mem_cache.hicache_storage", "PoolName", members=("KV", "MAMBA")),
    TouchPoint(
        "sglang.srt.mem_cache.hicache_storage", "PoolTransfer", fields=("name", "device_indices", "keys")
    ),
    TouchPoint("sglang.srt.mem_cache.unified_cache.component_type", "ComponentType", members=("SWA",)),
    TouchPoint("sglang.srt.mem_cache.radix_cache", "RadixKey", methods={"__init__": ("token_ids",)}),
    TouchPoint(
        "sglang.srt.mem_cache.utils", "get_storage_hash_str", parameters=("key", "prior_hash", "page_size")
    ),
    TouchPoint(
        "sglang.srt.mem_cache.cache_init_params", "CacheInitParams",
        fields=(
            "token_to_kv_pool_allocator", "req_to_token_pool", "page_size", "tp_cache_group",
            "attn_tp_cache_group", "pp_size", "attn_cp_size",
        ),
    ),
    TouchPoint(
        "sglang.srt.server_args", "ServerArgs",
        attributes=("device", "served_model_name", "model_path", "dp_size", "nnodes"),
    ),
    TouchPoint(
        _POOLS, "MHATokenToKVPool",
        attributes=("k_buffer", "v_buffer", "layer_num", "k_scale_buffer", "native_k_scale_buffer"),
    ),
    TouchPoint(_POOLS, "MLATokenToKVPool", attributes=("kv_buffer", "layer_num")),
    TouchPoint(
        _POOLS, "HybridLinearKVPool", attributes=("full_kv_pool", "full_attention_layer_id_mapping")
    ),
    TouchPoint(
        _POOLS, "HybridReqToTokenPool",
        methods={"register_layer_transfer_counter": ()},
        attributes=("mamba_pool", "mamba_map", "mamba_ckpt_pool", "short_conv_pool", "ngram_pool"),
    ),
    TouchPoint(_POOLS, "MambaPool", attributes=("mamba_cache", "num_mamba_layers")),
)  # fmt: skip

# What a refused request's answer is made by; checked in the process that serves HTTP.
K_HTTP_POINTS: tuple[TouchPoint, ...] = (
    TouchPoint(
        "sglang.srt.managers.tokenizer_manager",
        "TokenizerManager",
        methods={"_handle_abort_finish_reason": ("out", "state", "is_stream")},
    ),
    TouchPoint("sglang.srt.entrypoints.http_server", "_setup_and_run_http_server"),
    TouchPoint("sglang.srt.entrypoints.http_server", "app", members=("add_middleware",)),
    TouchPoint("sglang.srt.environ", "envs", members=(K_APP_PATH,)),
    TouchPoint("sglang.srt.plugins", "load_plugins"),
)
