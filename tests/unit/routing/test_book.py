"""What the book says is still to come over a link."""

from __future__ import annotations

from prfaas.model.decisions import PathPrediction
from prfaas.model.ids import LinkId
from prfaas.routing.book import DispatchBook

K_LINK = LinkId("east", "west")


def path(queue_s: float = 1.0, prefill_s: float = 2.0, size: int = 1000) -> PathPrediction:
    return PathPrediction(
        "east", "west", queue_s + prefill_s + 0.5, queue_s, prefill_s, 0.5, 100, transfer_bytes=size
    )


def test_bytes_come_until_their_prefill_is_predicted_to_end_though_nobody_says_so_yet() -> None:
    """Its server answers once they are across: what waits in the link is in the link's own backlog then."""
    book = DispatchBook()
    book.add("a", path(queue_s=1.0, prefill_s=2.0, size=1000), 10.0)
    book.add("b", path(queue_s=3.0, prefill_s=2.0, size=50), 10.0)
    found = {now: book.coming_bytes(K_LINK, now) for now in (10.0, 12.9, 13.1, 14.9, 15.1)}
    assert found == {10.0: 1050, 12.9: 1050, 13.1: 50, 14.9: 50, 15.1: 0}
    book.prefilled("a")
    book.drop("b")
    assert book.coming_bytes(K_LINK, 16.0) == 0


def test_a_prefill_that_ends_sooner_than_predicted_or_never_counts_once() -> None:
    book = DispatchBook()
    for name in ("a", "b", "c"):
        book.add(name, path(), 0.0)
    book.prefilled("a")
    book.drop("b")
    assert book.coming_bytes(K_LINK, 1.0) == 1000
    book.add("c", path(size=70), 1.0)  # another attempt
    assert book.coming_bytes(K_LINK, 2.0) == 70
    assert book.coming_bytes(K_LINK, 4.5) == 0


def test_a_policy_that_never_asks_for_them_keeps_no_more_than_what_is_under_way() -> None:
    book = DispatchBook()
    for number in range(1000):
        book.add(str(number), path(queue_s=0.0, prefill_s=1.0), float(number))
        if number > 3:
            book.drop(str(number - 3))
    assert sum(len(heap) for heap in book._coming.values()) < 10
