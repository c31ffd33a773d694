"""A peer that doesn't answer is dialled after growing, bounded pauses, and refusals are counted."""

from __future__ import annotations

from prfaas.pump.backoff import K_BACKOFF_FIRST_S, K_BACKOFF_MOST_S, Backoff


def test_pauses_grow_and_are_bounded():
    backoff, now, pauses = Backoff(0.0), 0.0, []
    for _ in range(40):
        backoff.failed(now, refused=False)
        pauses.append(backoff.next_s - now)
        now = backoff.next_s
    assert K_BACKOFF_FIRST_S < pauses[0] < pauses[3]
    assert max(pauses) <= 1.25 * K_BACKOFF_MOST_S
    assert min(pauses[10:]) >= 0.75 * K_BACKOFF_MOST_S


def test_an_answer_ends_the_pauses():
    backoff = Backoff(0.0)
    backoff.failed(1.0, refused=True)
    backoff.succeeded(2.0)
    assert (backoff.next_s, backoff.failures, backoff.refused_s(9.0)) == (2.0, 0, 0.0)


def test_only_refusals_count_as_refused_and_from_the_first_failure_on():
    backoff = Backoff(0.0)
    backoff.failed(1.0, refused=False)
    assert backoff.refused_s(5.0) == 0.0
    backoff.failed(2.0, refused=True)
    assert backoff.refused_s(5.0) == 4.0


def test_a_lost_stream_is_not_dialled_at_once():
    backoff = Backoff(0.0)
    backoff.wait(3.0)
    assert backoff.next_s == 3.0 + K_BACKOFF_FIRST_S
