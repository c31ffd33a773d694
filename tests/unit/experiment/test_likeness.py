"""Real and profiled answers are compared round by round, each side as often first as the other."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from prfaas_testbed.client import Answer
from prfaas_testbed.experiment.likeness import compare
from prfaas_testbed.experiment.profiling import rising


def test_both_sides_are_asked_the_same_in_turns_and_compared_by_quantile() -> None:
    asked: list[tuple[str, list[int]]] = []

    def side(name: str, factor: float) -> object:
        def ask(lengths: Sequence[int], new_tokens: int) -> list[Answer]:
            asked.append((name, list(lengths)))
            found = [
                Answer(id=str(i), sent_s=0.0, ttft_s=factor * tokens, e2e_s=2 * factor * tokens)
                for i, tokens in enumerate(lengths)
            ]
            return found[::-1]  # in the order of their ends

        return ask

    found = compare(side("real", 1.0), side("profiled", 1.1), 4096, rounds=4)  # type: ignore[arg-type]
    order = [name for name, _ in asked]
    assert order == ["real", "profiled", "profiled", "real"] * 2
    assert all(asked[i][1] == asked[i + 1][1] for i in range(0, 8, 2))
    assert max(found.lengths[0]) == 4096
    assert found.real_ttft_s[0] == [float(tokens) for tokens in found.lengths[0]]
    assert found.ratios() == pytest.approx(dict.fromkeys(("ttft_p50", "ttft_p90", "e2e_p50", "e2e_p90"), 1.1))


def test_noise_makes_no_longer_prompt_cheaper() -> None:
    assert rising([3.0, 2.0, 4.0]) == [3.0, 3.0, 4.0]
