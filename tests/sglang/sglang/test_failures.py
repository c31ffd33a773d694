"""Servers that die and come back. This file's pair is its own; its tests run in order, each leaving both
up.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from prfaas.config.loading import check
from prfaas.config.pump import PumpConfig
from prfaas.pump_client import LocalPumpClient
from prfaas.sglang.verify import compare, read_rows
from prfaas_testbed.experiment.presence import cpu_s
from prfaas_testbed.instances.sglang_client import Answer, generate, loads, new_room, post, prompt_of
from prfaas_testbed.instances.sglang_server import SglangServer

K_OUTPUT_TOKENS = 8
K_STAGING_BYTES = 10 << 20
K_POOL_TOKENS = 11000
K_FULL_SHARE = 0.9
K_KEPT_OPEN = 6
K_WAITING_SHARE = 0.5
"""Of a core."""


def eventually(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    end_s = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < end_s:
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def odd(start_own: Any, folder: Path) -> Iterator[Any]:
    """A prefill server of another page size, starting while the pair does."""
    spec = start_own.spec("dense", folder / "odd", extra_args=("--page-size", "16"))
    with SglangServer(spec, folder / "odd.log") as server:
        yield server


@pytest.fixture(scope="module")
def own(start_own: Any, odd: Any, folder: Path) -> Iterator[Any]:
    servers = start_own.start(
        "dense",
        folder,
        ("prefill", "decode"),
        prefill_args=("--chunked-prefill-size", "1024"),
        # A pool that many small requests fill: SGLang keeps room for the largest one's answer.
        decode_args=(
            *("--max-total-tokens", str(K_POOL_TOKENS), "--num-reserved-decode-tokens", "16"),
            *("--max-running-requests", "32"),
        ),
        # Two heartbeats that fail are a lost prefill server, as with SGLang's own five seconds.
        decode_env={"SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "3"},
        # As with pages on a GPU, but for the copies themselves.
        config={"staging": "always", "staging_bytes": K_STAGING_BYTES},
    )
    yield servers
    start_own.stop(servers)


def verdicts(servers: Any) -> dict[int, str]:
    """What the digests say, of rooms that have both rows."""
    sent, landed = read_rows(servers.verify, "sent"), read_rows(servers.verify, "landed")
    return {room: said for room, said in compare(sent, landed).items() if "no row" not in said}


def answer_of(servers: Any, prompt: list[int]) -> Answer:
    _, answer = servers.pair.generate(prompt, K_OUTPUT_TOKENS)
    return answer  # type: ignore[no-any-return]


def test_pages_by_way_of_staging_are_the_pages_that_were_sent(own: Any) -> None:
    # Decode stages 8 MiB whole; prefill's chunks of 1 MiB go in turn.
    rooms = [new_room() for _ in range(3)]
    for room, length in zip(rooms, (30, 1500, 8000), strict=True):
        _, answer = own.pair.generate(prompt_of(length, 9), K_OUTPUT_TOKENS, room)
        assert answer.error is None
    found = eventually(lambda: v if len(v := verdicts(own)) >= 3 else None)
    assert [found[room] for room in rooms] == ["equal"] * 3


def test_more_than_staging_holds_is_refused_with_the_figures(own: Any) -> None:
    _, answer = own.pair.generate(prompt_of(10300, 10), K_OUTPUT_TOKENS)
    assert answer.status == 500
    assert f"bytes of staging wanted, there are {K_STAGING_BYTES}" in (answer.error or "")
    assert answer_of(own, prompt_of(40, 11)).error is None


def test_prefill_killed_in_mid_request_costs_that_request_and_its_pages_come_back(own: Any) -> None:
    prompt = prompt_of(400, 1)
    before = answer_of(own, prompt)
    assert before.error is None
    used = loads(own.decode.url)["num_used_tokens"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(own.pair.generate, prompt_of(8000, 2), K_OUTPUT_TOKENS)
        assert eventually(lambda: loads(own.decode.url)["num_used_tokens"] > used)
        own.prefill.kill()
        _, lost = waiting.result(timeout=60)
    assert lost.status == 500
    assert "Lost connection with prefill instance" in (lost.error or "")
    # SGLang's own release would hold them for 30 s, since nobody is left to acknowledge.
    assert eventually(lambda: loads(own.decode.url)["num_used_tokens"] <= used, 10.0)

    own.prefill.start()
    own.prefill.wait_ready()
    again = eventually(lambda: a if (a := answer_of(own, prompt)).error is None else None)
    assert again.tokens == before.tokens
    own.decode.check_alive()


def test_decode_killed_and_restarted_is_served_by_the_prefill_that_stayed(own: Any) -> None:
    prompt = prompt_of(400, 3)
    before = answer_of(own, prompt)
    own.decode.kill()
    own.decode.start()
    own.decode.wait_ready()
    again = answer_of(own, prompt)
    assert again.error is None
    assert again.tokens == before.tokens
    own.prefill.check_alive()


@contextlib.contextmanager
def frozen(server: SglangServer, *, bootstrap_alone: bool = False) -> Iterator[None]:
    """All of a server's processes stand still: to its peers, a link over which nothing comes. Or the one with
    its HTTP and bootstrap servers alone.
    """
    assert server.pid is not None
    root = psutil.Process(server.pid)
    processes = [root] if bootstrap_alone else [root, *root.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def held(servers: Any) -> dict[str, int]:
    """What decode's processes and their pump have open."""
    assert servers.decode.pid is not None
    root = psutil.Process(servers.decode.pid)
    tree = [root, *root.children(recursive=True)]
    pump = check({"site": "test", "control_socket": str(servers.verify.parent / "pump.sock")}, PumpConfig, "")
    with LocalPumpClient.open(pump, start=False) as client:
        stats: Any = client.stats()
    load = loads(servers.decode.url)
    return {
        "pages": load["num_used_tokens"],
        "requests": load["num_running_reqs"] + load["num_waiting_reqs"],
        "crossing": sum(v for k, v in load["disaggregation"].items() if k.endswith("_queue_reqs")),
        "leases": stats["leases"],
        "transfers": stats["incoming"] + sum(peer["transfers"] for peer in stats["peers"]),
        "threads": sum(process.num_threads() for process in tree),
        "sockets": sum(len(process.net_connections("inet")) for process in tree),
    }


def test_link_lost_with_decodes_pool_nearly_full_frees_its_pages_and_every_fallback_finds_room(
    own: Any, record_testsuite_property: Callable[[str, object], None]
) -> None:
    prompts = [prompt_of(525, 100 + i) for i in range(19)]
    # One before, so that what is opened once is open.
    wanted = [answer_of(own, prompt).tokens for prompt in prompts[:1]]
    before = eventually(lambda: h if not (h := held(own))["crossing"] else None)
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        with frozen(own.prefill):
            waiting = [
                pool.submit(
                    generate,
                    own.decode.url,
                    prompt,
                    K_OUTPUT_TOKENS,
                    rid=f"lost-{i}",
                    bootstrap_host=own.pair.bootstrap_host,
                    bootstrap_port=own.pair.bootstrap_port,
                    bootstrap_room=new_room(),
                )
                for i, prompt in enumerate(prompts)
            ]
            full = K_FULL_SHARE * K_POOL_TOKENS
            assert eventually(lambda: loads(own.decode.url)["num_used_tokens"] >= full, 10.0)
            aborted_s = time.monotonic()
            for i in range(len(prompts)):
                post(f"{own.decode.url}/abort_request", {"rid": f"lost-{i}"})
            # Nobody is there to acknowledge: SGLang's own release would hold the pages for 30 s.
            assert eventually(lambda: loads(own.decode.url)["num_used_tokens"] <= before["pages"], 10.0)
            # From the first abort on; and a server's word on itself may be 0.9 s old: at most so long.
            record_testsuite_property("pages_free_after_s", round(time.monotonic() - aborted_s, 2))
            lost = [one.result(timeout=30) for one in waiting]
            assert all("abort" in (answer.error or "").lower() for answer in lost), lost
        # The same prompts by a path that works, all at once.
        found = list(pool.map(lambda prompt: answer_of(own, prompt), prompts))
    assert [answer.error for answer in found] == [None] * len(prompts)
    assert found[0].tokens == wanted[0]
    # Connections that an abort was the first to need stay open; one a request would be a leak.
    most = before | {"sockets": before["sockets"] + K_KEPT_OPEN}
    after = eventually(lambda: h if all((h := held(own))[k] <= most[k] for k in most) else None)
    assert after, f"before: {before}, now: {held(own)}"
    own.prefill.check_alive()


def losses(decode: SglangServer) -> int:
    """How often it has given a prefill server up."""
    return decode.log_path.read_text(errors="replace").count("Lost connection with prefill instance (")


def test_bootstrap_away_costs_the_requests_of_that_time_and_the_next_one_works(own: Any) -> None:
    prompt = prompt_of(400, 200)
    wanted = answer_of(own, prompt).tokens
    before = eventually(lambda: h if not (h := held(own))["crossing"] else None)
    known = losses(own.decode)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        with frozen(own.prefill, bootstrap_alone=True):
            waiting = [pool.submit(answer_of, own, prompt_of(300, 201 + i)) for i in range(4)]
            assert eventually(lambda: held(own)["crossing"] == 4, 10.0)
            began_s, used_s = time.monotonic(), cpu_s(own.decode)
            # Two of SGLang's heartbeats, and their time-outs.
            assert eventually(lambda: losses(own.decode) > known, 40.0)
            busy = (cpu_s(own.decode) - used_s) / (time.monotonic() - began_s)
        lost = [one.result(timeout=30) for one in waiting]
    assert {answer.status for answer in lost} == {500}
    assert all("Lost connection with prefill instance" in (answer.error or "") for answer in lost), lost
    # What only waits leaves this machine's few cores to others.
    assert busy < K_WAITING_SHARE
    # It is back, with all that it was asked meanwhile: nothing of that is done for nobody.
    most = before | {"sockets": before["sockets"] + K_KEPT_OPEN}
    after = eventually(lambda: h if all((h := held(own))[k] <= most[k] for k in most) else None)
    assert after, f"before: {before}, now: {held(own)}"
    again = eventually(lambda: a if (a := answer_of(own, prompt)).error is None else None)
    assert again.tokens == wanted
    assert eventually(lambda: loads(own.prefill.url)["num_waiting_reqs"] == 0)
    own.prefill.check_alive()


def test_prefill_of_another_page_size_is_refused_by_value_and_decode_lives(own: Any, odd: Any) -> None:
    odd.wait_ready()
    answer = generate(
        own.decode.url,
        prompt_of(50, 4),
        K_OUTPUT_TOKENS,
        bootstrap_host=odd.spec.host,
        bootstrap_port=odd.spec.bootstrap_port,
        bootstrap_room=new_room(),
    )
    assert answer.status == 500
    assert "prefill server has page_size=16, but decode server has page_size=1" in (answer.error or "")
    assert answer_of(own, prompt_of(50, 5)).error is None
