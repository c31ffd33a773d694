"""How predictions of reuse are judged, from raw rows alone, and what the router is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prfaas.config.loading import check
from prfaas.config.router import RouterConfig
from prfaas_testbed.experiment import prefixes
from prfaas_testbed.instances.models import K_MODELS

K_ALL = 1 + prefixes.K_CONVERSATIONS * prefixes.K_TURNS


def found_of(wrong: int = 0, reused: int = K_ALL, evicted_blocks: int = 50_000) -> prefixes.Found:
    rows = [
        {
            "actual": 100 if place < reused else 0,
            "predicted": 7 if place < wrong else 100 if place < reused else 0,
            "evicted_blocks": place * evicted_blocks // (K_ALL - 1),
        }
        for place in range(K_ALL)
    ]
    return prefixes.Found("dense", rows)


def failed(*founds: prefixes.Found) -> list[str]:
    return [row["name"] for row in prefixes.checks(founds) if row["outcome"] == "failed"]


def test_one_wrong_in_a_hundred_passes_and_more_fails() -> None:
    assert failed(found_of(), found_of(wrong=K_ALL // 100)) == []
    assert failed(found_of(), found_of(wrong=K_ALL // 100 + 1)) == ["dense/agree_share"]


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (found_of(reused=K_ALL // 4), "dense/reused_share"),
        (found_of(evicted_blocks=100), "dense/evicted_blocks"),
    ],
)
def test_agreement_about_an_unused_or_roomy_cache_is_worth_nothing(found: prefixes.Found, name: str) -> None:
    assert failed(found) == [name]


def test_a_request_that_the_router_says_nothing_of_fails() -> None:
    found = found_of()
    found.rows[5]["predicted"] = None
    assert failed(found) == ["dense/told"]
    del found.rows[5]
    assert failed(found) == ["dense/told"]


def test_a_row_has_what_the_router_predicted_for_that_request() -> None:
    def line(request: str, **more: Any) -> str:
        return json.dumps({"request": request, "event": "outcome", "attempts": 1, **more})

    log = [
        line("b", predicted_cached_tokens=3, cached_tokens=4),
        json.dumps({"request": "a", "event": "decision", "predicted_cached_tokens": 9}),
        line("a", predicted_cached_tokens=1, cached_tokens=2),
    ]
    rows = prefixes.joined([{"request": "a", "turn": 1}, {"request": "c", "turn": 2}], log)
    assert rows == [
        {"turn": 1, "predicted": 1, "actual": 2, "attempts": 1},
        {"turn": 2, "predicted": None, "actual": None, "attempts": None},
    ]


@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_the_router_is_told_what_the_servers_are_started_with(name: str, tmp_path: Path) -> None:
    model = K_MODELS[name]
    pair = prefixes.servers_of(model, tmp_path, (1024, 1025, 1026, 1027), (1028, 1029), tmp_path / "c.yaml")
    prefill, decode = (replace(server.spec, model_dir=tmp_path) for server in pair)
    written = prefixes.router_config(model, prefill, decode, (1028, 1029), 1030, tmp_path)
    config = check(written, RouterConfig, "test")
    [first, second] = config.sites[0].servers
    assert first.kv_events is not None
    assert str(first.kv_events.endpoint).endswith(":1028")
    events = json.loads(prefill.extra_args[prefill.extra_args.index("--kv-events-config") + 1])
    assert events["endpoint"].endswith(":1028")
    assert events["topic"] == first.kv_events.topic
    assert (
        (first.states_limit is not None)
        == ("--max-mamba-cache-size" in prefill.extra_args)
        == (name == "hybrid")
    )
    assert second.url == decode.url
