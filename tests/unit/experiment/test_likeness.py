"""A profile from repeated looks, and the comparison with what the real server did between them."""

from __future__ import annotations

import pytest

from prfaas_testbed.client import Answer
from prfaas_testbed.experiment.likeness import K_MIX_TOKENS, Likeness, rounds_of
from prfaas_testbed.experiment.profiling import Look, rising, settled, slowness, split_of


def answers(factor: float, lengths: list[int]) -> list[Answer]:
    found = [
        Answer(id=str(i), sent_s=0.0, ttft_s=factor * tokens, e2e_s=2 * factor * tokens)
        for i, tokens in enumerate(lengths)
    ]
    return found[::-1]  # in the order of their ends


def look(speed: float) -> Look:
    return Look([speed * 0.05, speed * 0.45], [speed * 0.01, speed * 0.41], [speed * 0.02])


def test_every_round_asks_for_all_lengths_that_the_model_takes_in_an_order_of_its_own() -> None:
    found = rounds_of(4096, 4)
    assert all(sorted(one) == [tokens for tokens in K_MIX_TOKENS if tokens <= 4096] for one in found)
    assert len({tuple(one) for one in found}) > 1
    assert found == rounds_of(4096, 4)


def test_both_sides_are_compared_by_quantile_as_ratios() -> None:
    bursts = rounds_of(4096, 2)
    real = [answers(1.0, one) for one in bursts]
    found = Likeness.of(bursts, real, [answers(1.1, one) for one in bursts], [1.0, 1.0])
    assert found.real_ttft_s[0] == [float(tokens) for tokens in bursts[0]]
    assert found.ratios() == pytest.approx(dict.fromkeys(("ttft_p50", "ttft_p90", "e2e_p50", "e2e_p90"), 1.1))


def test_every_request_of_either_side_is_a_row_with_what_was_asked_when() -> None:
    bursts = rounds_of(2048, 2)
    found = Likeness.of(
        bursts, [answers(1.0, one) for one in bursts], [answers(1.1, one) for one in bursts], [1.0, 1.0]
    )
    rows = found.rows()
    assert [row["prompt_tokens"] for row in rows if row["side"] == "real"] == [
        n for one in bursts for n in one
    ]
    assert len(rows) == 2 * sum(map(len, bursts))
    last = rows[-1]
    assert last["side"] == "profiled"
    assert last["round"] == 1
    assert last["sent_s"] == 0.0
    assert last["ttft_s"] == pytest.approx(1.1 * last["prompt_tokens"])
    assert last["e2e_s"] == pytest.approx(2.2 * last["prompt_tokens"])


def test_a_round_on_a_slower_machine_is_brought_to_the_usual_speed() -> None:
    bursts = rounds_of(4096, 2)
    real = [answers(1.0, bursts[0]), answers(1.5, bursts[1])]
    found = Likeness.of(bursts, real, [answers(1.0, one) for one in bursts], [1.0, 1.5])
    assert set(found.ratios().values()) == {1.0}
    assert found.ratios(at_its_speed=False)["ttft_p90"] < 0.9


def test_how_slow_a_round_was_is_known_from_the_looks_around_it() -> None:
    assert slowness([look(1.0), look(1.0), look(1.0), look(2.0)]) == pytest.approx([1.0, 1.0, 1.5])


def test_a_disturbed_look_moves_no_median() -> None:
    assert settled([look(1.0), look(9.0), look(1.0)]) == look(1.0)


def test_what_a_prompt_takes_alone_beyond_what_it_adds_to_others_is_latency() -> None:
    occupied, latency_s = split_of(look(1.0))
    assert occupied == pytest.approx([0.01, 0.41])
    assert latency_s == pytest.approx(0.04)


def test_noise_makes_no_latency_negative_and_no_longer_prompt_cheaper() -> None:
    occupied, latency_s = split_of(Look([0.1, 0.3], [0.5, 0.4], [0.02]))
    assert occupied == [0.5, 0.5]
    assert latency_s == 0
    assert rising([3.0, 2.0, 4.0]) == [3.0, 3.0, 4.0]
