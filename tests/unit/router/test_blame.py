"""Which failures say something of a link, in the words of real servers, and which servers rest for theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from prfaas.config.router import Server
from prfaas.model.observations import Role
from prfaas.model.transfer import FailureReason, TransferKind
from prfaas.router.attempt import AttemptFailed, FailureKind, Route, Side
from prfaas.router.blame import (
    blame_servers,
    is_decodes_alone,
    is_own_error,
    judge_servers,
    tells_of_link,
)
from prfaas.router.fleet import K_ERRORS_IN_A_ROW, ServerHandle
from prfaas.router.ticket import Ticket
from prfaas.router.tokens import Prompt
from prfaas.sglang.rooms import describe

K_OF_SGLANG = "Prefill transfer failed for request rank=0 req.rid='9f-00' req.bootstrap_room=41"
K_ERROR = "with exception KVTransferError(bootstrap_room=41): "


def told(text: str, side: Side = Side.PREFILL) -> AttemptFailed:
    return AttemptFailed(side, FailureKind.SERVER, f"500 {K_OF_SGLANG} {K_ERROR}{text}")


@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("kind", ["kv", "state", "aux"])
@pytest.mark.parametrize(
    ("reason", "detail", "of_link"),
    [
        (FailureReason.DEADLINE, "not acknowledged in time", True),
        (FailureReason.PEER_UNREACHABLE, "connection refused", True),
        (FailureReason.PEER_UNTRUSTED, "TLS: TLSV1_ALERT_UNKNOWN_CA", True),
        (FailureReason.CORRUPT, "block 3 arrived corrupt 16 times", True),
        (FailureReason.PUMP_LOST, "no pump until the deadline", True),
        (FailureReason.LEASE_ENDED, "deadline", True),
        (FailureReason.LEASE_ENDED, "cancelled", False),
        (FailureReason.LEASE_ENDED, "revoked", False),
        (FailureReason.LEASE_ENDED, "owner_gone", False),
        (FailureReason.LEASE_ENDED, "", False),
        (FailureReason.CANCELLED, "by the sender", False),
        (FailureReason.OWNER_GONE, "memory of process 7: No such process", False),
        (FailureReason.SOURCE_GONE, "memory of process 7: No such process", False),
        (FailureReason.ADDRESS_REFUSED, "outside of the lease", False),
        (FailureReason.LEASE_UNKNOWN, "", False),
        (FailureReason.TOO_MANY, "4096 transfers are under way", False),
        (FailureReason.BAD_REQUEST, "deadline: not a number", False),
    ],
)
def test_of_our_own_failures_the_link_rests_for_what_the_next_transfer_would_meet_as_well(
    reason: FailureReason, detail: str, of_link: bool, kind: str, side: Side
) -> None:
    assert tells_of_link(told(describe(TransferKind(kind), reason, detail), side)) is of_link
    # A profiled instance says the same in its own way.
    for before in ("transfer failed", "prefill failed"):
        plain = AttemptFailed(side, FailureKind.SERVER, f"500 {before}: {reason}: {detail}")
        assert tells_of_link(plain) is of_link


@pytest.mark.parametrize(
    "text",
    [
        "Failed to send kv chunk of 41 to 10.0.0.7:4711",
        "Failed to send state components of 41 to 10.0.0.7:4711",
        "Failed to send aux data of 41",
        "Decode instance could be dead, remote mooncake session 10.0.0.7:4711 is not alive",
        "Lost connection with prefill instance (bootstrap_addr: 10.0.0.5:8998)",
        "Prefill server with bootstrap_addr: 10.0.0.5:8998 is healthy before, but now it is down. Request",
        "Request 41 timed out after 300.2s in KVPoll.WaitingForInput",
        "Timed out waiting for prefill completion",
        "Could not fetch prefill parallel info from bootstrap_addr: 10.0.0.5:8998",
        "KV transfer to prefill 10.0.0.5:4711 failed",
        "Aborted: no answer from the prefill server's bootstrap at 10.0.0.5:8998",
        "KV checksum mismatch",
    ],
)
def test_of_sglangs_own_texts_the_link_rests_for_bytes_and_answers_that_did_not_come(text: str) -> None:
    assert tells_of_link(told(text, Side.DECODE))
    assert not is_own_error(told(text, Side.DECODE))


@pytest.mark.parametrize(
    "text",
    [
        "Aborted by AbortReq.",
        "Aborted by the decode server",
        "Aborted: prefill server 10.0.0.5:8998 refused: layers 36, here 28",
        "KV transfer aborted: can't be planned: index out of range",
        "KV transfer of room 41 aborted: a poll of this rank or of another one failed",
        "decode server: no 1048576 bytes of staging free; 4096 are",
        "HiCache restore failed",
        "Duplicate or cancelled bootstrap room",
        "Failed due to an unknown reason from another rank",
    ],
)
def test_what_one_request_or_server_fails_by_says_nothing_of_the_link(text: str) -> None:
    assert not tells_of_link(told(text))
    assert is_own_error(told(text))
    assert not is_own_error(told(text, Side.DECODE)), "decode tells of prefill's failures in the same words"


@pytest.mark.parametrize(
    "text",
    [
        "Internal Server Error",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "Grammar accept_token failed for req 9f-00 with token 17: no such state",
        "Metadata corruption detected - bootstrap_room mismatch",
        "a prompt that says transfer failed: it was late, at its deadline",
    ],
)
def test_any_other_error_is_the_servers_own(text: str) -> None:
    for side in Side:
        failed = AttemptFailed(side, FailureKind.SERVER, f"500 {text}")
        assert not tells_of_link(failed)
        assert is_own_error(failed)


def test_silence_is_the_links_until_prefill_has_ended_and_decodes_from_then_on() -> None:
    before = AttemptFailed(Side.PREFILL, FailureKind.TIMEOUT, "no first token within 3.0 s")
    after = AttemptFailed(Side.DECODE, FailureKind.TIMEOUT, "no first token within 3.0 s")
    assert tells_of_link(before)
    assert not tells_of_link(after)
    assert is_decodes_alone(after)
    assert not is_decodes_alone(before)


@pytest.mark.parametrize("kind", [FailureKind.REFUSED, FailureKind.CONNECT, FailureKind.LOST])
def test_a_refusal_or_a_server_that_is_not_there_is_no_failure_of_the_link(kind: FailureKind) -> None:
    failed = AttemptFailed(Side.PREFILL, kind, "503 KV transfer aborted: KV: deadline (late)")
    assert not tells_of_link(failed)
    assert not is_own_error(failed)


def handle(name: str, role: Role) -> ServerHandle:
    server = Server(name=name, role=role.value, url="http://h:1", bootstrap_port=1)
    return ServerHandle("west", server, cast(Any, None), cast(Any, None), role=role)


A, B, C = (f"prefill-{name}" for name in "abc")
D, E = "decode-d", "decode-e"


@pytest.mark.parametrize(
    ("failed", "served", "counts"),
    [
        ([(A, Side.PREFILL)], (B, D), {A}),
        ([(A, Side.PREFILL)], None, set()),
        ([(A, Side.PREFILL)], (A, D), set()),
        ([(A, Side.PREFILL)] * 2, (B, D), {A}),
        ([(A, Side.PREFILL), (B, Side.PREFILL)], (C, D), set()),
        ([(D, Side.DECODE)], (A, E), {D}),
        ([(D, Side.DECODE), (A, Side.PREFILL)], (B, E), {A, D}),
        ([(D, Side.DECODE), (E, Side.DECODE)], (A, D), set()),
    ],
)
def test_an_error_counts_against_a_server_where_another_then_serves_the_same_request(
    failed: list[tuple[str, Side]], served: tuple[str, str] | None, counts: set[str]
) -> None:
    servers = {name: handle(name, Role.PREFILL) for name in (A, B, C)}
    servers |= {name: handle(name, Role.DECODE) for name in (D, E)}
    for _ in range(K_ERRORS_IN_A_ROW):
        ticket = Ticket("r", "m", "", "", Prompt(10), None, 0.0)
        for name, side in failed:
            route = Route(servers[D], servers[A], 10)
            route = replace(route, prefill=servers[name]) if name in (A, B, C) else route
            route = replace(route, decode=servers[name]) if name in (D, E) else route
            own = AttemptFailed(side, FailureKind.SERVER, "500 Internal Server Error")
            assert blame_servers(ticket, route, own, 0.0, 5.0) is servers[name]
        if served is not None:
            ticket.route = Route(servers[served[1]], servers[served[0]], 10)
            judge_servers(ticket, 0.0, 5.0)
    assert {name for name, one in servers.items() if not one.up(1.0)} == counts
