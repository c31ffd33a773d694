"""One decode server, a prefill server in its own site by SGLang's stock engine, and one elsewhere by ours."""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from prfaas.sglang.verify import compare, read_rows
from prfaas_testbed.instances.sglang_client import Answer, Pair, generate, loads, new_room, prompt_of

K_OUTPUT_TOKENS = 16
pytestmark = pytest.mark.parametrize("servers", ["dense"], indirect=True)


def eventually(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    end_s = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < end_s:
        time.sleep(0.1)
    return value


def plain(servers: Any, prompt: list[int]) -> Answer:
    return generate(servers.plain.url, prompt, K_OUTPUT_TOKENS)


def test_both_tiers_at_once_each_give_a_plain_servers_tokens(servers: Any) -> None:
    prompts = [prompt_of(80 + 211 * i, 300 + i) for i in range(8)]
    rooms = [new_room() for _ in prompts]
    pairs = [servers.pair, servers.near_pair] * 4
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        asked = [
            pool.submit(pair.generate, prompt, K_OUTPUT_TOKENS, room)
            for pair, prompt, room in zip(pairs, prompts, rooms, strict=True)
        ]
        answers = [one.result(timeout=120)[1] for one in asked]
    for answer, prompt in zip(answers, prompts, strict=True):
        assert answer.error is None
        assert answer.tokens == plain(servers, prompt).tokens
    # Ours writes down what it moves; of the site's own it has seen nothing.
    far = set(rooms[::2])
    found = eventually(lambda: v if far <= set(v := said_of(servers)) else None, 10.0) or said_of(servers)
    assert {room: found.get(room) for room in rooms} == {
        room: "equal" if room in far else None for room in rooms
    }


def said_of(servers: Any) -> dict[int, str]:
    """What the digests say, of rooms that have both rows."""
    sent, landed = read_rows(servers.verify, "sent"), read_rows(servers.verify, "landed")
    return {room: said for room, said in compare(sent, landed).items() if "no row" not in said}


@contextlib.contextmanager
def frozen(server: Any) -> Iterator[None]:
    """All of a server's processes stand still, as behind a link over which nothing comes."""
    root = psutil.Process(server.pid)
    processes = [
        p for p in (root, *root.children(recursive=True)) if "prfaas.pump" not in " ".join(p.cmdline())
    ]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def test_a_site_elsewhere_that_stands_still_does_not_hold_up_the_sites_own(servers: Any) -> None:
    far, near = prompt_of(400, 401), prompt_of(400, 402)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with frozen(servers.prefill):
            waiting = pool.submit(servers.pair.generate, far, K_OUTPUT_TOKENS)
            assert eventually(lambda: crossing(servers) > 0, 10.0)
            _, answer = servers.near_pair.generate(near, K_OUTPUT_TOKENS)
            assert not waiting.done()
        _, late = waiting.result(timeout=60)
    assert answer.tokens == plain(servers, near).tokens
    assert late.tokens == plain(servers, far).tokens


def crossing(servers: Any) -> int:
    """Requests whose KV decode waits for, by its own word."""
    queues = loads(servers.decode.url)["disaggregation"]
    return sum(n for name, n in queues.items() if name.endswith("_queue_reqs"))


def test_a_server_that_does_not_run_prfaas_and_is_not_named_as_near_is_refused_with_what_to_do(
    servers: Any,
) -> None:
    # Its address as inet_aton reads it, which isn't in near.hosts.
    pair = Pair(servers.near.url, servers.decode.url, "127.3", servers.near_pair.bootstrap_port)
    _, answer = pair.generate(prompt_of(200, 405), K_OUTPUT_TOKENS)
    assert answer.status == 500
    assert "one does that doesn't run prfaas; if it is of this site, name its host in near.hosts" in (
        answer.error or ""
    )
    prompt = prompt_of(200, 406)
    _, answer = servers.near_pair.generate(prompt, K_OUTPUT_TOKENS)
    assert answer.tokens == plain(servers, prompt).tokens


def test_the_sites_own_prefill_killed_costs_its_requests_alone(servers: Any) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(servers.near_pair.generate, prompt_of(8000, 403), K_OUTPUT_TOKENS)
        assert eventually(lambda: crossing(servers) > 0, 10.0)
        servers.near.kill()
        prompt = prompt_of(300, 404)
        _, answer = servers.pair.generate(prompt, K_OUTPUT_TOKENS)
        assert answer.tokens == plain(servers, prompt).tokens
        _, lost = waiting.result(timeout=60)
    assert lost.status == 500
    assert "Lost connection with prefill instance" in (lost.error or "")
    servers.decode.check_alive()
    servers.prefill.check_alive()
