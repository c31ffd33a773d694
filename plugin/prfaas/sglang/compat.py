"""Every place where this package touches SGLang, what it expects there, and a check of it.

Nothing else in prfaas imports sglang: the rest of the package takes names from here (`compat.KVPoll`), which
are resolved at first use, so that importing this module costs a server that doesn't use the backend nothing.

To move the pin: change K_VERSION and pyproject's extra, run tests/sglang/sglang/test_touch_points.py, and
follow what it names.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prfaas.model.errors import MachineError

if TYPE_CHECKING:
    import sglang  # noqa: F401  What is imported by name below, for the import rules to see.

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

_COMMON = "sglang.srt.disaggregation.common.conn"
_MOONCAKE = "sglang.srt.disaggregation.mooncake.conn"
_POOLS = "sglang.srt.mem_cache.memory_pool"


class SglangMoved(MachineError):
    """SGLang isn't where this version of prfaas expects it: what was expected, and what was found."""


@dataclass(frozen=True)
class TouchPoint:
    """One name of SGLang's that prfaas uses, and what it relies on.

    `members` must exist on it; `methods` maps a method's name to parameters it must take; `parameters` are
    those of a function; `engine_calls`, of a class, are the only methods that its source may ask of
    `self.engine`.
    """

    module: str
    name: str
    members: tuple[str, ...] = ()
    methods: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
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
    TouchPoint("sglang.srt.plugins.hook_registry", "HookType", members=("AROUND", "BEFORE")),
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
        },
        members=("kv_status_msg_carries_reason",),
    ),
    TouchPoint(
        _MOONCAKE,
        "MooncakeKVManager",
        methods={
            "init_engine": (),
            "register_buffer_to_engine": (),
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
        engine_calls=frozenset(
            {"batch_register", "batch_deregister", "batch_transfer_sync", "get_session_id", "send_probe"}
        ),
    ),
    TouchPoint(
        _MOONCAKE, "MooncakeKVSender",
        members=("supports_host_tensor_indices",),
        methods={"abort": (), "clear": (), "poll": (), "failure_exception": ()},
    ),
    TouchPoint(
        _MOONCAKE, "MooncakeKVReceiver",
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

# What layers are seen by as they finish; checked with the others. Fields of a batch and its requests are made
# in constructors, where they can't be checked: layers.py gives up when one is missing, and KV leaves by the
# chunk.
K_LAYER_POINTS: tuple[TouchPoint, ...] = (
    TouchPoint("sglang.srt.managers.scheduler", "Scheduler", methods={"run_batch": ("batch",)}),
    TouchPoint(
        _POOLS, "MHATokenToKVPool",
        methods={"set_kv_buffer": ("layer", "loc_info", "layer_id_override", "dcp_kv_mask")},
    ),
    TouchPoint(
        _POOLS, "MLATokenToKVPool",
        methods={
            "set_kv_buffer": ("layer", "loc_info", "layer_id_override"),
            "set_mla_kv_buffer": ("layer", "loc_info", "layer_id_override"),
        },
    ),
    TouchPoint(_POOLS, "unwrap_write_loc", parameters=("loc_info",)),
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

_NAMES = {
    point.name: point
    for point in (
        *K_NEAR_POINTS,
        *K_ENTRANCE,
        *K_ENTRANCE_UTILS,
        *K_BACKEND_POINTS,
        *K_LAYER_POINTS,
        *K_HTTP_POINTS,
    )
}


def __getattr__(name: str) -> Any:
    """A name of SGLang's from the tables above, imported now."""
    point = _NAMES.get(name)
    if point is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _resolve(point)


def check(points: Iterable[TouchPoint], found_version: str | None = None) -> None:
    """Hold every point against the SGLang that is installed.

    Raises SglangMoved naming the first that differs, with what was expected and what was found.
    """
    version = found_version or installed_version()
    for point in points:
        problem = _problem(point)
        if problem:
            raise SglangMoved(
                f"prfaas is made for SGLang {K_VERSION}, this is {version}: {point.path}: {problem}; "
                f"install sglang=={K_VERSION} or a prfaas made for {version}"
            )


def check_backend(with_http: bool = True) -> None:
    """All points at once, the version too; `with_http`: those of the process that serves HTTP as well, which
    needs its modules. Raises SglangMoved.
    """
    version = installed_version()
    if version != K_VERSION:
        raise SglangMoved(
            f"prfaas is made for SGLang {K_VERSION}, this is {version}; "
            f"install sglang=={K_VERSION} or a prfaas made for {version}"
        )
    http = K_HTTP_POINTS if with_http else ()
    check((*K_ENTRANCE, *K_ENTRANCE_UTILS, *K_BACKEND_POINTS, *K_LAYER_POINTS, *http), version)


def installed_version() -> str:
    return str(getattr(importlib.import_module("sglang"), "__version__", "of unknown version"))


def has_cuda() -> bool:
    """Whether torch finds a GPU."""
    return bool(importlib.import_module("torch").cuda.is_available())


def utils_loaded() -> bool:
    """Whether SGLang itself has loaded the module that chooses a backend's classes in this process."""
    return "sglang.srt.disaggregation.utils" in sys.modules


def add_backend_member() -> Any:
    """TransferBackend.PRFAAS, added in place: SGLang imports the enum by name before plugins load."""
    enum = _resolve(_NAMES["TransferBackend"])
    if K_BACKEND in enum._value2member_map_:
        return enum(K_BACKEND)
    member = object.__new__(enum)
    name = K_BACKEND.upper()
    member._name_, member._value_, member._sort_order_ = name, K_BACKEND, len(enum._member_names_)
    member.__objclass__ = enum
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[K_BACKEND] = member
    type.__setattr__(enum, name, member)
    return member


def _resolve(point: TouchPoint) -> Any:
    try:
        module = importlib.import_module(point.module)
    except ImportError as error:
        raise SglangMoved(f"{point.path}: expected a module {point.module}, found: {error}") from error
    try:
        return getattr(module, point.name)
    except AttributeError:
        raise SglangMoved(f"{point.path}: expected there, not found") from None


def _problem(point: TouchPoint) -> str:
    """What differs at a point, or nothing."""
    try:
        thing = _resolve(point)
    except SglangMoved as moved:
        return str(moved).removeprefix(f"{point.path}: ")
    for member in point.members:
        if not hasattr(thing, member):
            return f"expected a member {member}, found none"
    if point.parameters and (lack := _lacking(thing, point.parameters)):
        return lack
    for name, parameters in point.methods.items():
        method = getattr(thing, name, None)
        if not callable(method):
            return f"expected a method {name}, found {type(method).__name__}"
        if lack := _lacking(method, parameters):
            return f"{name}: {lack}"
    if point.fields:
        found = (
            {item.name for item in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
        )
        if missing := [name for name in point.fields if name not in found]:
            return f"expected fields {', '.join(missing)}, found {', '.join(sorted(found)) or 'none'}"
    if point.engine_calls:
        calls = set(re.findall(r"self\.engine\.(\w+)", inspect.getsource(thing)))
        if calls != point.engine_calls:
            return (
                f"expected it to ask its engine for {', '.join(sorted(point.engine_calls))}, "
                f"found {', '.join(sorted(calls))}"
            )
    return ""


def _lacking(function: Any, parameters: tuple[str, ...]) -> str:
    try:
        found = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return f"expected a function of ({', '.join(parameters)}), found {function!r}"
    missing = [name for name in parameters if name not in found]
    return f"expected parameters {', '.join(missing)}, found ({', '.join(found)})" if missing else ""
