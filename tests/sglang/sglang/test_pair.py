"""A prefill and a decode server against a plain one: equal tokens, and the right bytes in the right
places.
"""

from __future__ import annotations

import concurrent.futures
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import pytest

from prfaas.config.backend import load_backend_config
from prfaas.pump_client import LocalPumpClient
from prfaas.sglang.ahead import K_LEAST_BYTES
from prfaas.sglang.verify import compare, read_rows
from prfaas_testbed.instances.sglang_client import Answer, generate, get, loads, new_room, post, prompt_of

K_LOGPROB_BOUND = 0.05
K_OUTPUT_TOKENS = 16
K_LENGTHS = (20, 512, 2048, 4700)
K_PAUSED_TOKENS = 320
"""Two seconds and more: a server's word on what it runs may be a second old."""
K_AUX_BYTES = 1600
K_CHECKSUM_BYTES = {"kda": 64}
"""Beside them, of a pair under SGLang's own checksum."""
K_CHUNK_TOKENS = 4096
"""SGLang's own on a CPU."""
K_CACHED_LAYERS = {"dense": 4, "hybrid": 1, "mla": 4, "window": 1, "kda": 1}
"""Layers whose cache grows with the prompt: what is state leaves at the end."""
K_ZERO_ROOM, K_DROP_ROOM = 7_000_000_000_001, 7_000_000_000_002


def assert_equal(answer: Answer, reference: Answer) -> None:
    assert answer.error is None
    assert answer.tokens == reference.tokens
    assert len(answer.logprobs) == len(reference.logprobs) == len(reference.tokens)
    worst = max(abs(a - b) for a, b in zip(answer.logprobs, reference.logprobs, strict=True))
    assert worst <= K_LOGPROB_BOUND


def eventually(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    end_s = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < end_s:
        time.sleep(0.1)
    return value


def verdict(servers: Any, room: int) -> str:
    """What the digests say of a room, once both rows are there."""

    def rows() -> tuple[list[Any], list[Any]] | None:
        sides = [
            [r for r in read_rows(servers.verify, side) if r["room"] == room] for side in ("sent", "landed")
        ]
        return (sides[0], sides[1]) if all(sides) else None

    found = eventually(rows, 10.0)
    return compare(*found)[room] if found else "rows are missing"


def sent_of(servers: Any, room: int) -> Any:
    return next(row for row in read_rows(servers.verify, "sent") if row["room"] == room)


def bytes_of(servers: Any, room: int) -> Any:
    return sent_of(servers, room)["bytes"]


def idle(servers: Any) -> bool:
    """Whether neither server holds a page or has a request, by its own word."""
    return all(
        (load := loads(server.url))["num_running_reqs"] == 0 and load["num_waiting_reqs"] == 0
        for server in (servers.prefill, servers.decode)
    )


def ahead_bytes(model: Any, length: int) -> int:
    """What had left of a prompt before its chunks were handed over: of each chunk the layers that are worth a
    transfer of their own.
    """
    chunks = [min(K_CHUNK_TOKENS, length - at) for at in range(0, length, K_CHUNK_TOKENS)]
    bytes_of_each = [chunk * model.kv_bytes_per_token for chunk in chunks]
    return sum(n for n in bytes_of_each if n // K_CACHED_LAYERS[model.name] >= K_LEAST_BYTES)


def equals_plain_cold_and_warm(servers: Any, length: int) -> None:
    model = servers.model
    seed, length = length, min(length, model.longest_prompt_tokens - 100)
    prompt = prompt_of(length, seed)
    reference = generate(servers.plain.url, prompt, K_OUTPUT_TOKENS)
    room = new_room()
    prefill, decode = servers.pair.generate(prompt, K_OUTPUT_TOKENS, room)
    assert_equal(decode, reference)
    assert prefill.cached_tokens == 0
    assert verdict(servers, room) == "equal"
    assert bytes_of(servers, room) == {
        "kv": length * model.kv_bytes_per_token,
        "state": model.state_bytes + min(length, model.window_tokens) * model.window_bytes_per_token,
        "aux": K_AUX_BYTES + K_CHECKSUM_BYTES.get(model.name, 0),
    }
    assert sent_of(servers, room)["ahead_bytes"] == ahead_bytes(model, length)

    # Longer by some: a hybrid model's state can be used again at exactly the earlier prompt's length.
    longer = prompt + prompt_of(40, seed)
    reference = generate(servers.plain.url, longer, K_OUTPUT_TOKENS)
    room = new_room()
    prefill, decode = servers.pair.generate(longer, K_OUTPUT_TOKENS, room)
    assert_equal(decode, reference)
    assert prefill.cached_tokens >= length - 1
    assert verdict(servers, room) == "equal"
    if model.name in ("dense", "hybrid"):
        # Decode has the earlier prompt: the new part alone crosses, but a state whole.
        assert length - 1 <= decode.cached_tokens <= length
        assert bytes_of(servers, room) == {
            "kv": (len(longer) - decode.cached_tokens) * model.kv_bytes_per_token,
            "state": model.state_bytes,
            "aux": K_AUX_BYTES,
        }


# Stacked, so that pytest sees which tests share a model's servers.
@pytest.mark.parametrize("length", K_LENGTHS)
@pytest.mark.parametrize("servers", ["dense", "hybrid", "mla"], indirect=True)
def test_tokens_and_logprobs_equal_a_plain_servers_cold_and_with_prefills_cache_warm(
    servers: Any, length: int
) -> None:
    equals_plain_cold_and_warm(servers, length)


def test_eight_requests_at_once_each_get_their_own_answer(servers: Any) -> None:
    eight_at_once_each_get_their_own_answer(servers)


def eight_at_once_each_get_their_own_answer(servers: Any) -> None:
    prompts = [prompt_of(100 + 137 * i, 100 + i) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: servers.pair.generate(prompt, K_OUTPUT_TOKENS)[1], prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_equal(answer, generate(servers.plain.url, prompt, K_OUTPUT_TOKENS))


@pytest.mark.parametrize("servers", ["hybrid"], indirect=True)
def test_a_prompt_that_prefill_computes_again_for_want_of_a_state_crosses_once(servers: Any) -> None:
    prompt, model = prompt_of(700, 77), servers.model
    for ahead in (700 * model.kv_bytes_per_token, 0):
        assert eventually(lambda: post(f"{servers.decode.url}/flush_cache", {})[0] == 200)
        room, before = new_room(), payload_sent(servers)
        prefill, decode = servers.pair.generate(prompt, K_OUTPUT_TOKENS, room)
        assert_equal(decode, generate(servers.plain.url, prompt, K_OUTPUT_TOKENS))
        assert prefill.cached_tokens == 0
        assert verdict(servers, room) == "equal"
        assert sent_of(servers, room)["ahead_bytes"] == ahead
        # Twice would be 1.7 times; a block that was late on a busy machine may be repeated.
        once = sum(bytes_of(servers, room).values())
        assert once <= payload_sent(servers) - before < 1.5 * once


@pytest.mark.parametrize("servers", ["dense", "hybrid"], indirect=True)
def test_each_turn_of_a_session_sends_its_new_part_alone(servers: Any) -> None:
    """Decode keeps what it was sent and what it said itself; of a hybrid model, with the state after its last
    token but one."""
    model, history, known = servers.model, prompt_of(600, 90), 0
    for turn in range(4):
        room = new_room()
        _, answer = servers.pair.generate(history, K_OUTPUT_TOKENS, room)
        assert answer.error is None
        assert answer.tokens == generate(servers.plain.url, history, K_OUTPUT_TOKENS).tokens
        assert verdict(servers, room) == "equal"
        assert answer.cached_tokens == known
        assert bytes_of(servers, room) == {
            "kv": (len(history) - known) * model.kv_bytes_per_token,
            "state": model.state_bytes,
            "aux": K_AUX_BYTES,
        }
        known = len(history) + K_OUTPUT_TOKENS - 1
        history = [*history, *answer.tokens, *prompt_of(90 + 10 * turn, 91 + turn)]


def payload_sent(servers: Any) -> int:
    """Bytes of KV, state and auxiliary data that the pump has sent, repeats included."""
    config = load_backend_config(servers.prefill.spec.config_path)
    with LocalPumpClient.open(config.pump, start=False) as client:
        stats: Any = client.stats()
    return sum(int(peer["payload_bytes_sent"]) for peer in stats["peers"])


@pytest.mark.parametrize("servers", ["mla"], indirect=True)
def test_requests_whose_pages_decode_took_back_each_end_with_their_own_answer(servers: Any) -> None:
    # On a slow machine prompts come so far apart that none meets another in decode's batch, and of one alone
    # no page is taken back; those that prefill has cached come closer together.
    for _ in range(5):
        eight_at_once_each_get_their_own_answer(servers)
        if n_taken_back(servers):
            break
    assert n_taken_back(servers) > 0


def n_taken_back(servers: Any) -> int:
    said = re.findall(r"Testing retraction. #retracted_reqs: (\d+)", servers.decode.log_path.read_text())
    return sum(map(int, said))


def logprobs_of(url: str, prompt: list[int], answer: list[int]) -> list[float]:
    """What a server gives an answer that it is shown as part of its prompt."""
    body = {
        "input_ids": [*prompt, *answer],
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": len(prompt) - 1,
    }
    status, said = post(f"{url}/generate", body, 60.0)
    assert status == 200, said
    return [row[0] for row in said["meta_info"]["input_token_logprobs"][-len(answer) :]]


def test_what_a_pause_takes_back_goes_through_prefill_again_and_ends_right(servers: Any) -> None:
    """SGLang's pause for a change of weights: decode gives up the pages of what it runs, and asks prefill for
    them anew, in the same room. What was computed step by step is then computed at once, and bfloat16 rounds
    otherwise: 0.05 to 0.55 on a plain server that nobody paused. By as much may an answer differ, up to where
    it takes another turn.
    """
    prompts = [prompt_of(150 + 70 * i, 700 + i) for i in range(3)]
    asked_before = servers.prefill.log_path.read_text().count("POST /generate")
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        asked = [pool.submit(servers.pair.generate, prompt, K_PAUSED_TOKENS) for prompt in prompts]
        assert eventually(lambda: loads(servers.decode.url)["num_running_reqs"] == len(prompts))
        assert post(f"{servers.decode.url}/pause_generation", {"mode": "retract"})[0] == 200
        assert not any(one.done() for one in asked)
        assert post(f"{servers.decode.url}/continue_generation", {})[0] == 200
        answers = [one.result(timeout=120)[1] for one in asked]
        plain = servers.plain.url
        references = list(pool.map(lambda prompt: generate(plain, prompt, K_PAUSED_TOKENS), prompts))
    assert servers.prefill.log_path.read_text().count("POST /generate") - asked_before == 2 * len(prompts)
    rounding = max(
        apart(reference.logprobs, logprobs_of(plain, prompt, reference.tokens))
        for prompt, reference in zip(prompts, references, strict=True)
    )
    for answer, reference in zip(answers, references, strict=True):
        assert answer.error is None
        assert len(answer.tokens) == len(answer.logprobs) == K_PAUSED_TOKENS
        turns = [i for i, (a, b) in enumerate(zip(answer.tokens, reference.tokens, strict=True)) if a != b]
        until = turns[0] + 1 if turns else K_PAUSED_TOKENS
        # The turn too: the likeliest token, by either rounding.
        assert apart(answer.logprobs[:until], reference.logprobs[:until]) <= rounding + K_LOGPROB_BOUND


def apart(some: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


def test_bootstrap_and_control_pass_by_the_pump_alone(servers: Any) -> None:
    servers.pair.generate(prompt_of(64, 4), 4)
    config = load_backend_config(servers.prefill.spec.config_path)
    with LocalPumpClient.open(config.pump, start=False) as client:
        stats: Any = client.stats()
    # The bootstrap, the prefill rank's socket, and the decode rank's for the way back or none yet.
    assert stats["forwards"]["endpoints"] >= 2
    assert stats["forwards"]["failed"] == 0
    assert stats["forwarded_in"] >= 2
    sides = [processes(server.pid) for server in (servers.prefill, servers.decode)]
    for here, there in (sides, sides[::-1]):
        offered = {c.laddr.port for c in connections(there) if c.status == psutil.CONN_LISTEN}
        dialled = {c.raddr.port for c in connections(here) if c.raddr}
        own = {c.laddr.port for c in connections(here) if c.status == psutil.CONN_LISTEN}
        assert not dialled & (offered - own), "a server dials the other without the pump"


def processes(pid: int) -> list[psutil.Process]:
    """A server's processes, without the pump that one of them may have started."""
    first = psutil.Process(pid)
    return [p for p in (first, *first.children(recursive=True)) if "prfaas.pump" not in " ".join(p.cmdline())]


def connections(of: Sequence[psutil.Process]) -> list[Any]:
    return [c for process in of for c in process.net_connections("tcp")]


def test_one_token_is_right_and_needs_no_decode_step(servers: Any) -> None:
    prompt = prompt_of(64, 3)
    _, answer = servers.pair.generate(prompt, 1)
    assert_equal(answer, generate(servers.plain.url, prompt, 1))


def test_first_token_that_stops_ends_the_answer(servers: Any) -> None:
    prompt = prompt_of(64, 4)
    first = generate(servers.plain.url, prompt, 1).tokens[0]
    params = {"temperature": 0, "max_new_tokens": 8, "stop_token_ids": [first]}
    _, answer = servers.pair.generate(prompt, 8, sampling_params=params)
    assert answer.error is None
    assert answer.tokens == [first]
    assert answer.finish["type"] == "stop"


def second_on(answer: Answer, reference: Answer) -> bool:
    """Whether the answer is wrong after a right first token, which travels apart from KV."""
    return answer.tokens[0] == reference.tokens[0] and answer.tokens != reference.tokens


@pytest.mark.parametrize(
    ("room", "says"), [(K_ZERO_ROOM, "kv differ"), (K_DROP_ROOM, "kv differ")], ids=["zeroed", "page dropped"]
)
def test_damaged_kv_is_seen_by_the_digests_and_in_the_tokens(servers: Any, room: int, says: str) -> None:
    # Each its own: of a prompt that a hybrid model's prefill computes again KV crosses twice.
    prompt = prompt_of(512, 5 + room % 10)
    reference = generate(servers.plain.url, prompt, K_OUTPUT_TOKENS)
    _, answer = servers.pair.generate(prompt, K_OUTPUT_TOKENS, room)
    assert verdict(servers, room) == says
    assert second_on(answer, reference)


def abort_in_flight(servers: Any, prompt: Sequence[int], rid: str) -> Answer:
    """Start a request, abort it on both sides while its prefill goes on; decode's answer."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(servers.pair.generate, prompt, 64, rid=rid)
        assert eventually(lambda: not idle(servers))
        for server in (servers.prefill, servers.decode):
            status, _ = post(f"{server.url}/abort_request", {"rid": rid})
            assert status == 200
        return waiting.result(timeout=60)[1]


def test_aborted_request_ends_and_leaves_nothing_and_the_next_one_works(servers: Any) -> None:
    before = loads(servers.decode.url)["num_used_tokens"]
    answer = abort_in_flight(servers, prompt_of(8000, 6), "to-be-aborted")
    assert answer.error is not None
    assert "abort" in answer.error.lower()
    assert eventually(lambda: idle(servers))
    # Well below the 30 s for which SGLang's own release would hold the pages.
    assert eventually(lambda: loads(servers.decode.url)["num_used_tokens"] <= before, 10.0)
    prompt = prompt_of(300, 7)
    _, answer = servers.pair.generate(prompt, K_OUTPUT_TOKENS)
    assert_equal(answer, generate(servers.plain.url, prompt, K_OUTPUT_TOKENS))


def test_both_servers_are_healthy_after_all_of_it(servers: Any) -> None:
    for server in (servers.plain, servers.prefill, servers.decode):
        server.check_alive()
        assert get(f"{server.url}/health")[0] == 200


def test_no_server_imports_the_models_that_it_is_not_of(servers: Any) -> None:
    """SGLang's own two hundred modules take seconds, and on a CPU some of them fail with a warning."""
    for server in (servers.plain, servers.prefill, servers.decode):
        assert "when loading sglang.srt.models" not in server.log_path.read_text(errors="replace")


# A length within a chunk and one across chunks: what else there is to see, `hybrid` shows.
@pytest.mark.parametrize("length", [512, 4500])
@pytest.mark.parametrize("servers", ["kda"], indirect=True)
def test_a_kimi_linear_models_tokens_and_logprobs_equal_a_plain_servers(servers: Any, length: int) -> None:
    equals_plain_cold_and_warm(servers, length)


@pytest.mark.parametrize("servers", ["kda"], indirect=True)
def test_sglangs_own_checksum_refuses_what_was_damaged_on_the_way_and_takes_the_next_one(
    servers: Any,
) -> None:
    for room in (K_ZERO_ROOM, K_DROP_ROOM):
        _, answer = servers.pair.generate(prompt_of(512, room % 10), K_OUTPUT_TOKENS, room)
        assert answer.status == 500
        assert "KV checksum mismatch" in (answer.error or "")
    assert servers.decode.log_path.read_text(errors="replace").count("KV checksum mismatch req=") == 2
    assert eventually(lambda: idle(servers))
    prompt = prompt_of(512, 8)
    _, answer = servers.pair.generate(prompt, K_OUTPUT_TOKENS)
    assert_equal(answer, generate(servers.plain.url, prompt, K_OUTPUT_TOKENS))


# Last, so that its servers don't come between another model's tests. SGLang's windowed attention on CPU takes
# prompts of one chunk: the last would be the case before again.
@pytest.mark.parametrize("length", K_LENGTHS[:-1])
@pytest.mark.parametrize("servers", ["window"], indirect=True)
def test_a_windowed_models_tokens_and_logprobs_equal_a_plain_servers(servers: Any, length: int) -> None:
    equals_plain_cold_and_warm(servers, length)
