"""From a workload to shots and from answers to rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prfaas.config.experiment import Experiment, load_experiment
from prfaas_testbed.client import Answer
from prfaas_testbed.experiment.door import where_of
from prfaas_testbed.experiment.load import Planned, one_server_shots, plan, rows_of, wanted_bytes
from prfaas_testbed.experiment.servers import Server
from prfaas_testbed.experiment.transfers import Moved
from prfaas_testbed.instances.models import K_MODELS

TOPOLOGIES = Path(__file__).parents[3] / "topologies"


def two_sites() -> Experiment:
    found = load_experiment("two-sites", TOPOLOGIES)
    assert isinstance(found, Experiment)
    return found


def server(name: str, site: str, role: str) -> Server:
    process: Any = None
    return Server(name, site, role, "10.0.0.1", 30000, process)


def test_the_main_load_is_the_traces_cut_to_8k_and_shares_no_prefix() -> None:
    requests = plan(two_sites(), real=True, seed=1)
    assert len(requests) == 40
    lengths = [len(request.tokens) for request in requests]
    assert 4096 < max(lengths) <= 8192
    assert len(set(lengths)) > 30  # the trace's own, and not one length for all
    assert len({tuple(request.tokens[:8]) for request in requests}) == 40
    assert [r.at_s for r in requests] == sorted(r.at_s for r in requests)
    assert all(4 <= token < 1000 for request in requests for token in request.tokens)


def test_the_same_seed_asks_the_same() -> None:
    assert plan(two_sites(), True, 5) == plan(two_sites(), True, 5)
    assert plan(two_sites(), True, 5) != plan(two_sites(), True, 6)


def test_bytes_wanted_are_the_models() -> None:
    assert wanted_bytes(100, None, K_MODELS["dense"]) == 102_400
    hybrid = wanted_bytes(100, None, K_MODELS["hybrid"])
    assert hybrid == 100 * K_MODELS["hybrid"].kv_bytes_per_token + K_MODELS["hybrid"].state_bytes


def test_rows_carry_what_both_sides_wrote_and_silence_is_an_error() -> None:
    requests = [Planned("a", 0.5, [1, 2], 4), Planned("b", 1.0, [3], 4)]
    answer = Answer("a", 0.51, ttft_s=0.1, e2e_s=0.2, output_ids=[7])
    moved = {9: Moved("d", "d", 100, start_s=50.6, end_s=50.7)}
    east = server("p", "east", "prefill")
    first, second = rows_of([answer], requests, "m", 50.0, {"a": (9, east)}, moved, lambda n: 10 * n, "west")
    extra = first.model_extra or {}
    assert (first.site, first.kv_bytes, extra["transfer"], extra["wanted_kv_bytes"]) == (
        "east",
        100,
        "wan",
        20,
    )
    assert (extra["transfer_start_s"], extra["transfer_end_s"]) == (0.6, 0.7)
    assert second.error == "the load generator told nothing"
    assert second.e2e_s is None


def test_a_routers_answers_are_found_by_its_headers() -> None:
    servers = [
        server("near", "near", "prefill"),
        server("home", "home", "prefill"),
        server("d", "home", "decode"),
    ]
    headers = {"x-prfaas-site": "near", "x-prfaas-request-id": "q", "x-prfaas-attempts": "2"}
    answers = [Answer("a", 0, headers=headers), Answer("b", 0, error="no", headers={})]
    found = where_of(answers, servers, {5: Moved(rid="q-00"), 6: Moved(rid="q-01")})
    assert found == {"a": (6, servers[0])}


def test_one_server_gets_every_request_at_its_time() -> None:
    (shot,) = one_server_shots([Planned("a", 1.5, [1], 3)], "http://h:1", False, 9)
    assert (shot.at_s, shot.targets[0].url, shot.body["sampling_params"]["max_new_tokens"]) == (
        1.5,
        "http://h:1/generate",
        3,
    )
