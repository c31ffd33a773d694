"""A prefix that another site's prefill instance holds, brought into this one's cache by lease and transfer.

The giver prefills the prefix for this instance as it would for a decode server, of which its own cache leaves
one token to compute; here the bytes land in pages that the cache then keeps. SGLang 0.5.23 has no such way:
what comes from outside reaches its radix cache through HiCache alone, whose copies between host and device
(`sgl_kernel.kvcacheio`) exist for accelerators only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from prfaas_testbed.instances.profiled import content
from prfaas_testbed.instances.profiled.instance import Instance
from prfaas_testbed.instances.profiled.mover import MoveFailed
from prfaas_testbed.instances.profiled.peers import Refused


async def take_prefix(instance: Instance, tokens: Sequence[int], room: int, peer: tuple[str, int]) -> int:
    """Have `tokens` and the state at their end in the cache; bytes that crossed. Raises Refused."""
    receiver, scheduler, settings = instance._receiver, instance.scheduler, instance.settings
    if receiver is None or scheduler.role == "decode":
        raise Refused(f"a {scheduler.role} server takes no prefixes", 400)
    notes: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    instance._notes[room] = notes
    try:
        cached = scheduler.cache.match(tokens)
        skip = instance._kv_end(cached, len(tokens)) if cached else 0
        size = instance.profile.kv_bytes(len(tokens)) - skip
        try:
            text, memory = await receiver.lease(room, size, settings.transfer_timeout_s)
        except MoveFailed as error:
            raise Refused(str(error)) from None
        body = {"room": room, "grant": text, "skip_bytes": skip, "port": settings.port, "host": settings.host}
        await instance._peers.post(peer, "/profiled/grant", body)
        note = await instance._all_landed(room, notes)
        digest = content.digest(memory)
        instance._log(room=room, side="prefix", digest=digest, bytes=size, at_s=instance._clock())
        if digest != note["digest"]:
            raise Refused("the prefix arrived damaged")
        if not scheduler.take_in(tokens):
            raise Refused("no room for the prefix", 503)
        instance._wake.set()
        return size
    finally:
        instance._notes.pop(room, None)
        await receiver.release(room)
