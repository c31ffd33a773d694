"""SGLang's injected failures, drawn once for each side of a request: an SGLang plugin, entered by the entry
point in the dist-info folder beside it, for servers with this folder on their PYTHONPATH.

SGLang draws SGLANG_TEST_DISAGG_FAILURE_PROB anew whenever a request is polled, at every turn of a scheduler's
loop. With a GPU to feed a request is polled a few times; a tiny model's server on a CPU turns hundreds of
times while one crosses, and at 12% a poll not one in a million would. So here each side of a request fails
with that probability, at one of its first polls.
"""

from __future__ import annotations

import os
import random
import sys
from typing import Any

K_PROBABILITY = "SGLANG_TEST_DISAGG_FAILURE_PROB"
K_FIRST_POLLS = 12
_HOW_MANY_MORE = "_polls_until_failure"


def load_plugin() -> None:
    """Does nothing where no failures are asked for."""
    if os.environ.get(K_PROBABILITY):
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(
            "sglang.srt.disaggregation.utils._poll_with_failure_injection", poll, HookType.REPLACE
        )


def poll(pollers: list[Any]) -> list[int]:
    """SGLang's, with a failure's place drawn at a request's first poll. None: it doesn't fail."""
    return [0 if _fails(poller) else int(poller.poll()) for poller in pollers]


def _fails(poller: Any) -> bool:
    if not hasattr(poller, _HOW_MANY_MORE):
        fails = random.random() < float(os.environ[K_PROBABILITY])
        setattr(poller, _HOW_MANY_MORE, random.randrange(K_FIRST_POLLS) if fails else None)
    more = getattr(poller, _HOW_MANY_MORE)
    if more is None:
        return False
    if more == 0:
        sys.stderr.write(f"injected failure: {type(poller).__name__} of room {poller.bootstrap_room}\n")
    setattr(poller, _HOW_MANY_MORE, more - 1)
    return bool(more <= 0)
