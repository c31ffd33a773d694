"""A refusal's way from a room's failure to its client, without SGLang: text, finish reason, HTTP."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prfaas.sglang.answers import RefusalAnswers, abort_refused, note_refused
from prfaas.sglang.refusal import K_CODE, Refusal

K_REFUSAL = Refusal("link to west: queue-full", 2.5)


@given(st.text(), st.floats(0, 1e6), st.text(), st.text())
@example("", 1.375, "", "5")
def test_a_refusals_text_is_read_again_whatever_surrounds_it(
    reason: str, retry_after_s: float, before: str, after: str
) -> None:
    refusal = Refusal(reason.replace("\n", " "), retry_after_s)
    found = Refusal.found_in(before.replace(K_CODE, "") + refusal.text + after)
    assert found is not None
    assert found.reason == refusal.reason.replace(";", ",")
    assert found.retry_after_s == pytest.approx(retry_after_s, abs=0.01)


def test_other_failures_are_no_refusals() -> None:
    assert Refusal.found_in("KV transfer aborted: KV: deadline") is None
    assert Refusal.found_in("") is None


def request() -> SimpleNamespace:
    return SimpleNamespace(finished_reason=None)


def prepare_abort(req: Any, error_message: str, status_code: Any = None) -> None:
    """SGLang's, in short."""
    req.finished_reason = SimpleNamespace(message=error_message, status_code=status_code, err_type=None)


def test_an_abort_for_a_refusal_gets_its_status_and_kind_and_others_keep_theirs() -> None:
    req = request()
    abort_refused(prepare_abort, req, f"Decode transfer failed with exception {K_REFUSAL.text}", 500)
    assert vars(req.finished_reason) == {"message": K_REFUSAL.text, "status_code": 503, "err_type": K_CODE}
    abort_refused(prepare_abort, req, "Decode transfer failed", status_code=500)
    assert vars(req.finished_reason) == {
        "message": "Decode transfer failed",
        "status_code": 500,
        "err_type": None,
    }


def aborted(refusal: Refusal | None) -> dict[str, Any]:
    """What SGLang's HTTP process hears of an aborted request."""
    reason = {"type": "abort", "message": "other", "status_code": 500, "err_type": None}
    if refusal is not None:
        reason |= {"message": refusal.text, "status_code": 503, "err_type": K_CODE}
    return {"meta_info": {"finish_reason": reason}}


def answer_of(app: Any, kind: str = "http") -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(dict(message))

    async def receive() -> Any:
        return {"type": "http.request"}

    asyncio.run(RefusalAnswers(app)({"type": kind}, receive, send))
    return sent


def start(status: int) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": []}


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def assert_refused(sent: list[dict[str, Any]]) -> None:
    head, body = sent
    headers = dict(head["headers"])
    assert head["status"] == 503
    assert headers[b"retry-after"] == b"3"
    assert int(headers[b"content-length"]) == len(body["body"])
    error = json.loads(body["body"])["error"]
    assert (error["code"], error["message"]) == (K_CODE, K_REFUSAL.text)


def test_a_refused_answer_is_503_with_retry_after_whatever_the_endpoint_would_say() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        note_refused(None, aborted(K_REFUSAL), None, False)
        await send(start(500))
        await send(part(b"stock"))

    assert_refused(answer_of(app))


def test_a_refused_stream_has_no_stream_header_and_its_later_parts_are_dropped() -> None:
    async def body(send: Any) -> None:
        await asyncio.sleep(0)
        note_refused(None, aborted(K_REFUSAL), None, True)
        await send(part(b"data: {}", more=True))
        await send(part(b"data: [DONE]"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(200))  # as streams do, before there is anything to say
        await asyncio.gather(asyncio.create_task(body(send)))

    assert_refused(answer_of(app))


@pytest.mark.parametrize("refusal_too_late", [False, True])
def test_other_answers_pass_unchanged(refusal_too_late: bool) -> None:
    said = [start(200), part(b"a", more=True), part(b"b")]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        note_refused(None, aborted(None), None, True)
        await send(said[0])
        await send(said[1])
        if refusal_too_late:
            note_refused(None, aborted(K_REFUSAL), None, True)
        await send(said[2])

    assert answer_of(app) == said


def test_one_requests_refusal_is_not_anothers() -> None:
    async def refused(scope: Any, receive: Any, send: Any) -> None:
        note_refused(None, aborted(K_REFUSAL), None, False)
        await asyncio.sleep(0.02)
        await send(start(500))
        await send(part(b""))

    async def fine(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.01)
        await send(start(200))
        await send(part(b"yes"))

    async def both() -> tuple[list[Any], list[Any]]:
        sent: tuple[list[Any], list[Any]] = ([], [])

        async def run(app: Any, out: list[Any]) -> None:
            async def send(message: Any) -> None:
                out.append(message)

            await RefusalAnswers(app)({"type": "http"}, None, send)  # type: ignore[arg-type]

        await asyncio.gather(run(refused, sent[0]), run(fine, sent[1]))
        return sent

    first, second = asyncio.run(both())
    assert (first[0]["status"], second[0]["status"]) == (503, 200)


def test_what_is_no_http_request_passes_untouched() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})

    assert answer_of(app, "lifespan") == [{"type": "lifespan.startup.complete"}]
    note_refused(None, aborted(K_REFUSAL), None, False)  # outside of a request: nobody to tell
