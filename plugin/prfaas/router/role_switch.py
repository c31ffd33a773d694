"""SGLang's `/pd_role_switch`, asked of one server."""

from __future__ import annotations

import asyncio
import logging

import aiohttp
import msgspec

from prfaas.config.router import SlowLoop
from prfaas.model.errors import ConfigError
from prfaas.model.observations import Role
from prfaas.router.fleet import ServerHandle, read_key

log = logging.getLogger("prfaas.router")

K_MAX_ANSWER_BYTES = 1 << 16
K_NO_ANSWER = (
    TimeoutError, OSError, aiohttp.ClientError, ConfigError,
    msgspec.DecodeError, RecursionError, UnicodeDecodeError,
)  # fmt: skip
"""What may come instead of a server's answer to its change of role."""


class _Error(msgspec.Struct):
    message: str = ""


class SwitchAnswer(msgspec.Struct):
    """What a server says to `/pd_role_switch`."""

    success: bool = False
    message: str = ""
    safe_to_restore: bool | None = None
    """It is as it was. None: not told."""
    error: _Error | None = None


_ANSWER = msgspec.json.Decoder(SwitchAnswer)


async def ask_switch(handle: ServerHandle, role: Role, config: SlowLoop) -> SwitchAnswer | None:
    """None: nothing that could be understood."""
    headers = handle.headers
    body = {
        "new_role": role.value,
        "decode_cuda_graph_memory_gb": config.decode_cuda_graph_memory_gb,
    }
    try:
        if handle.config.admin_key_file is not None:
            field, file = f"{handle.name}.admin_key_file", handle.config.admin_key_file
            key = await asyncio.to_thread(read_key, field, file)
            headers = headers | {"Authorization": f"Bearer {key}"}
        async with asyncio.timeout(config.switch_timeout_s):
            async with handle.session.post(
                handle.url + "/pd_role_switch", json=body, headers=headers, allow_redirects=False
            ) as response:
                return _ANSWER.decode(await response.content.read(K_MAX_ANSWER_BYTES))
    except K_NO_ANSWER as error:
        log.warning("%s: no usable answer to its change of role: %r", handle.name, error)
        return None
