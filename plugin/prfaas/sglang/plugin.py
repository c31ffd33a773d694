"""The entry point that SGLang calls in each of its processes (group `sglang.srt.plugins`): it registers and
no more.

A process that doesn't use the backend pays for one legal word of a flag, one enum member and one hook, which
hands every other backend's question on. The hooks that answer refusals are only where the backend is used,
and its modules are imported when SGLang asks for its classes.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from prfaas.model.errors import MachineError, PrfaasError, UsageError
from prfaas.sglang import command_line, compat, touch_points

if TYPE_CHECKING:
    from prfaas.config.backend import BackendConfig

logger = logging.getLogger(__name__)

K_BACKEND_FLAG = "--disaggregation-transfer-backend"
K_MODE, K_SWITCH = "--disaggregation-mode", "--enable-pd-role-switch"
K_LINKER_MODULE = "prfaas.sglang.prefixes.linker"
K_APPLICATION = "prfaas.sglang.http_app:app"

Part = Literal["flag", "classes", "answers", "passage", "layers"]
_registered: set[Part] = set()
"""Of this process: each part once, however often SGLang loads its plugins and whoever is the first to ask."""
_pump: socket.socket | None = None
"""Of the process that serves HTTP: what keeps the node's pump waiting for its schedulers."""


def load_plugin() -> None:
    """Idempotent. With the backend asked for, an SGLang that moved ends the launch here, with one line."""
    asked = backend_asked_for(sys.argv)
    try:
        if asked:
            config = _check_configuration()
            # SGLang's schedulers are children of the process that serves HTTP.
            serves_http = multiprocessing.parent_process() is None
            compat.check_backend(with_http=serves_http)
            mode = command_line.value_of(sys.argv, K_MODE)
            if config.near is not None and mode == "decode":
                from prfaas.sglang import near

                near.check_installed()
            _check_prefixes(config, mode, serves_http)
            if serves_http and mode in ("prefill", "decode"):
                _find_pump(config)
            _register_answers(serves_http)
            if serves_http:
                _name_application()
            if config.control is not None:
                _register_passage()
            # A decode server's layers aren't looked at, unless it may change its role.
            if config.overlap == "layer" and (mode == "prefill" or command_line.says(sys.argv, K_SWITCH)):
                _register_layers()
        register(with_classes=asked or compat.utils_loaded())
    except PrfaasError as error:
        if asked:
            # Not an Exception's subclass: SGLang logs a plugin's exceptions and goes on.
            raise SystemExit(f"prfaas: {error}") from None
        logger.warning("prfaas isn't available: %s", error)


def _check_configuration() -> BackendConfig:
    """The file that PRFAAS_CONFIG names, before minutes of loading. Raises UsageError or ConfigError."""
    from prfaas.config.backend import K_ENVIRONMENT, load_backend_config

    return load_backend_config(os.environ.get(K_ENVIRONMENT))


def _check_prefixes(config: BackendConfig, mode: str | None, begins: bool) -> None:
    """The section and SGLang's flags go together; a decode server beside may read the same file. `begins`: in
    the launch's first process, where its port must be free as well. Raises UsageError, MachineError,
    SglangMoved.
    """
    linked = command_line.says(sys.argv, touch_points.K_LINKER_FLAG) and K_LINKER_MODULE in (
        command_line.value_of(sys.argv, touch_points.K_LINKER_CONFIG) or ""
    )
    if linked != (config.prefixes is not None) and (linked or mode != "decode"):
        flags = (
            f"{touch_points.K_LINKER_FLAG} --unified-cache-external-linker-backend dynamic "
            f"{touch_points.K_LINKER_CONFIG} "
            f'\'{{"linker": "PrefixLinker", "linker_module_path": "{K_LINKER_MODULE}"}}\''
        )
        lacking = "the section" if linked else "the flags"
        raise UsageError(f"`prefixes:` in the backend's file goes with {flags}; found without {lacking}")
    if linked:
        compat.check(touch_points.K_PREFIX_POINTS)
    if linked and begins and config.prefixes is not None:
        from prfaas.config.pump import split_address

        try:
            socket.create_server(split_address(config.prefixes.listen)).close()
        except OSError as error:
            why = error.strerror or error
            raise MachineError(f"prefixes.listen: {config.prefixes.listen}: {why}") from None


def _find_pump(config: BackendConfig) -> None:
    """The node's, or one of ours: a certificate or a port that it can't use is known before minutes of
    loading. Raises MachineError.

    The connection stays for as long as this process: its schedulers attach when the model is loaded, and a
    pump that a server started ends without a client long before that.
    """
    global _pump
    from prfaas.pump_client.launch import connect_or_start

    _pump = connect_or_start(config.pump)


def complete(config: BackendConfig, prefills: bool) -> None:
    """In a scheduler that uses the backend: what its command line would have had registered, had it one; an
    engine that was made in Python hasn't. Raises SglangMoved.
    """
    before = set(_registered)
    _register_answers(serves_http=False)
    if config.control is not None:
        _register_passage()
    if config.overlap == "layer" and prefills:
        _register_layers()
    if before != _registered:
        compat.check_backend(with_http=False)
        compat.HookRegistry.apply_hooks()


def backend_asked_for(argv: Sequence[str]) -> bool:
    """Whether the command line names this backend; spawned children inherit their parent's."""
    return command_line.value_of(argv, K_BACKEND_FLAG) == touch_points.K_BACKEND


def _first(part: Part) -> bool:
    """Whether it is for the caller to register that part."""
    before = part in _registered
    _registered.add(part)
    return not before


def _register_answers(serves_http: bool) -> None:
    """The hooks by which a refusal reaches its client."""
    if not _first("answers"):
        return
    from prfaas.sglang import answers

    answers.register_in_scheduler()
    if serves_http:
        answers.register_in_http_process()


def _name_application() -> None:
    """What several HTTP workers import, should there be any: ours, which loads plugins first."""
    named = os.environ.setdefault(touch_points.K_APP_PATH, K_APPLICATION)
    if named != K_APPLICATION:
        logger.warning(
            "prfaas: %s names %s: with --tokenizer-worker-num above 1 that must import %s first, or the "
            "workers don't know the backend",
            touch_points.K_APP_PATH,
            named,
            K_APPLICATION.partition(":")[0],
        )


def serve_http_in_worker() -> None:
    """In one of several HTTP workers, plugins being loaded: refusals are answered here too."""
    if not backend_asked_for(sys.argv):
        return
    from prfaas.sglang import answers

    compat.check(touch_points.K_HTTP_POINTS)
    answers.register_in_http_process()
    compat.HookRegistry.apply_hooks()
    answers.add_middleware()


def _register_passage() -> None:
    """The hook by which SGLang's bootstrap is reached through the pumps."""
    if _first("passage"):
        from prfaas.sglang import passage

        passage.register_in_scheduler()


def _register_layers() -> None:
    """The hooks by which a prefill server's layers are seen as they finish."""
    if _first("layers"):
        from prfaas.sglang import layers

        layers.register_in_scheduler()


def register(with_classes: bool) -> None:
    """Make the flag legal; `with_classes`: also the enum member and the hook, which need SGLang's heavier
    module.
    """
    if "flag" not in _registered:
        compat.check(touch_points.K_ENTRANCE)
        if touch_points.K_BACKEND not in compat.DISAGG_TRANSFER_BACKEND_CHOICES:
            compat.add_disagg_transfer_backend_choices([touch_points.K_BACKEND])
        _registered.add("flag")
    if with_classes and "classes" not in _registered:
        compat.check(touch_points.K_ENTRANCE_UTILS)
        compat.add_backend_member()
        compat.HookRegistry.register(touch_points.K_GET_KV_CLASS, choose_class, compat.HookType.AROUND)
        _registered.add("classes")


def choose_class(original: Any, transfer_backend: Any, class_type: Any) -> Any:
    """SGLang's get_kv_class, with ours for our member."""
    if getattr(transfer_backend, "value", None) != touch_points.K_BACKEND:
        return original(transfer_backend, class_type)
    kinds = compat.KVClassType
    if class_type == kinds.KVARGS:
        return original(transfer_backend, class_type)
    import prfaas.sglang.backend as backend

    return {
        kinds.MANAGER: backend.PrfaasKVManager,
        kinds.SENDER: backend.PrfaasKVSender,
        kinds.RECEIVER: backend.PrfaasKVReceiver,
        kinds.BOOTSTRAP_SERVER: backend.PrfaasKVBootstrapServer,
    }[class_type]
