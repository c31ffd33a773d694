"""A ledger and the pumps that ask it, over a wire that loses, reorders and reconnects: promises never exceed
the estimate, and once the wire is quiet all books agree.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prfaas.admission import OfferBook, Standing
from prfaas.admission.edf import first_broken
from prfaas.admission.offers import K_AGAIN_S, K_PAGE_ROWS
from prfaas.config.pump import LinkConfig
from prfaas.model.ids import LinkId
from prfaas.model.observations import LinkObservation
from prfaas.pump.ledger_host import LedgerHost

LINK = LinkId("east", "west")
CONFIG = LinkConfig.model_validate(
    {"peer_site": "west", "admission": {"nominal_bps": 80e6, "max_pumps": 4, "queue_limit": 4}}
)
MB = 1_000_000
QUESTION = {"size_bytes": MB, "deadline_s": 2.0}


class Wire:
    """One stream between a pump and the host: two queues, in order, that may end with something in them."""

    def __init__(self) -> None:
        self.up: deque[dict] = deque()
        self.down: deque[dict] = deque()


class Asker:
    """A pump without its sockets: as the desk carries the bodies, so does this."""

    def __init__(self, name: str, boot: int) -> None:
        self.site_name, self.boot = name, boot
        self.name = f"{name}/{boot}"
        self.book = OfferBook()
        self.streams = [Wire()]
        self.backlog_bytes, self.rate_bps = 0, 0.0
        self.reported_s = 0.0

    def key(self, number: int) -> str:
        return f"{self.boot}/{self.site_name}/{number}"

    def say(self, body: dict | None) -> None:
        if body is not None:
            self.streams[-1].up.append({**body, "pump": self.name})

    def report(self, now: float) -> None:
        interval_s = max(0.01, now - self.reported_s)
        seen = LinkObservation(
            link=LINK, at_s=now, interval_s=interval_s, backlog_bytes=self.backlog_bytes, sender=self.name,
            delivered_bytes=int(self.rate_bps / 8 * interval_s) if self.backlog_bytes else 0,
        )  # fmt: skip
        self.reported_s = now
        fields = {k: v for k, v in asdict(seen).items() if k not in ("link", "at_s")}
        self.say({"op": "report", "seen": fields, "demand_bps": 1e9, "page": self.book.page()})


class WireMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.now = 0.0
        self.host = LedgerHost(LINK, CONFIG, self.now)
        self.pumps = [Asker(name, 0) for name in ("a", "b", "c")]
        self.n_asked = 0

    # What pumps do

    @rule(
        i=st.integers(0, 2), size=st.integers(0, 60), deadline_s=st.floats(0.1, 12), queue=st.booleans(),
        first_s=st.sampled_from([0.0, 0.0, 1.0]),
    )  # fmt: skip
    def ask(self, i: int, size: int, deadline_s: float, queue: bool, first_s: float) -> None:
        self.n_asked += 1
        body = {
            "size_bytes": size * 100_000, "deadline_s": deadline_s, "may_queue": queue,
            "first_in_s": first_s, "ready_in_s": first_s * 2,
        }  # fmt: skip
        pump = self.pumps[i]
        pump.say(pump.book.ask(pump.key(self.n_asked), body, self.now))

    @rule(i=st.integers(0, 2), which=st.integers(0, 30))
    def release(self, i: int, which: int) -> None:
        pump = self.pumps[i]
        keys = [key for key, _ in pump.book.standings()]
        if keys:
            pump.say(pump.book.drop(keys[which % len(keys)]))

    @rule(i=st.integers(0, 2), which=st.integers(0, 30), left=st.integers(0, 40))
    def progress(self, i: int, which: int, left: int) -> None:
        pump = self.pumps[i]
        keys = [key for key, standing in pump.book.standings() if standing >= Standing.ADMITTED]
        if keys:
            pump.book.progress(keys[which % len(keys)], left * 100_000)

    @rule(i=st.integers(0, 2), mbps=st.sampled_from([0, 5, 40, 80, 120]), backlog=st.booleans())
    def carry(self, i: int, mbps: float, backlog: bool) -> None:
        self.pumps[i].rate_bps, self.pumps[i].backlog_bytes = mbps * 1e6, MB * backlog

    @rule(i=st.integers(0, 2))
    def report(self, i: int) -> None:
        self.pumps[i].report(self.now)

    @rule(i=st.integers(0, 2))
    def decide_alone(self, i: int) -> None:
        """The host can't be reached: what was asked long ago is promised by the pump itself."""
        for key, question in self.pumps[i].book.unheard(self.now, 1.0):
            assert question["op"] == "offer"
            self.pumps[i].book.decide(key, Standing.ADMITTED)

    @rule(i=st.integers(0, 2))
    def pump_restarts(self, i: int) -> None:
        """Its servers ask the next one again."""
        old = self.pumps[i]
        self.pumps[i] = new = Asker(old.site_name, old.boot + 1)
        for key, _ in old.book.standings():
            new.say(new.book.ask(new.key(int(key.rpartition("/")[2])), QUESTION, self.now))

    # What the wire does

    @rule(i=st.integers(0, 2), which=st.integers(0, 8), up=st.booleans())
    def deliver(self, i: int, which: int, up: bool) -> None:
        """The next message of any stream, an old one's as well: so they come in another order."""
        streams = self.pumps[i].streams
        self.hand_over(self.pumps[i], streams[which % len(streams)], up)

    @rule(i=st.integers(0, 2))
    def deliver_all(self, i: int) -> None:
        pump = self.pumps[i]
        while any(stream.up or stream.down for stream in pump.streams):
            for stream in list(pump.streams):
                self.hand_over(pump, stream, up=True)
                self.hand_over(pump, stream, up=False)

    @rule(i=st.integers(0, 2))
    def reconnect(self, i: int) -> None:
        """A new stream; what is in the others may still come."""
        self.pumps[i].streams.append(Wire())

    @rule(i=st.integers(0, 2), which=st.integers(0, 8))
    def lose(self, i: int, which: int) -> None:
        streams = self.pumps[i].streams
        del streams[which % len(streams)]
        if not streams:
            streams.append(Wire())

    @precondition(lambda self: self.now > 1)
    @rule()
    def host_restarts(self) -> None:
        self.host = LedgerHost(LINK, CONFIG, self.now)
        for pump in self.pumps:
            pump.streams = [Wire()]

    def hand_over(self, pump: Asker, stream: Wire, up: bool) -> None:
        if up and stream.up:
            body = stream.up.popleft()
            host = self.host

            def news(key: str, what: dict) -> None:
                if host is self.host:
                    pump.streams[-1].down.append({"op": "news", "key": key, **what})

            stream.down.append(host.answer(body, news, self.now))
        elif not up and stream.down:
            _, again = pump.book.hear(stream.down.popleft(), self.now)
            for question in again:
                pump.say(question)

    # Time

    @rule(step_s=st.sampled_from([0.02, 0.1, 0.1, 0.5, 2.0]))
    def pass_time(self, step_s: float) -> None:
        self.now += step_s
        self.host.tick(self.now)

    @rule()
    def quiet(self) -> None:
        """Nothing is lost, nobody asks or gives up: for longer than a dead pump is waited for."""
        for pump in self.pumps:
            pump.streams = [Wire()]
        for _ in range(20):
            self.pass_time(K_AGAIN_S + 0.05)
            for i, pump in enumerate(self.pumps):
                pump.report(self.now)
                self.deliver_all(i)
        held = {key: (one.pump, self.host._standing(key)) for key, one in self.host._held.items()}
        asked = {key: (pump.name, standing) for pump in self.pumps for key, standing in pump.book.standings()}
        assert held == asked

    def teardown(self) -> None:
        if hasattr(self, "host"):
            self.quiet()

    @invariant()
    def promises_fit_the_estimate(self) -> None:
        if not hasattr(self, "host"):
            return
        host = self.host
        usable_bps = host.estimator.estimate(self.now).usable_bps
        assert host.ledger.statistics().rate_bps <= usable_bps
        host.ledger.poll(self.now)
        assert first_broken(host.ledger._held.values(), host.ledger._rate_bps, self.now) is None

    @invariant()
    def shares_fit_what_was_believed_while_they_were_granted(self) -> None:
        if hasattr(self, "host"):
            promised_bps = self.host.book.promised_bps(self.now)
            assert promised_bps <= self.host.believed_bps(self.now) * (1 + 1e-9) + 1

    @invariant()
    def the_host_knows_whose_each_promise_is(self) -> None:
        if not hasattr(self, "host"):
            return
        ledger = self.host.ledger
        assert set(self.host._held) == set(ledger._held) | set(ledger._waiting)
        numbered = {key for numbers in self.host._numbered.values() for key in numbers.values()}
        assert numbered == set(self.host._held)


WireMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
test_wire = pytest.mark.timeout(60)(WireMachine.TestCase)


def pair() -> tuple[LedgerHost, OfferBook, list[tuple[str, dict]]]:
    return LedgerHost(LINK, CONFIG, 0.0), OfferBook(), []


def said(host: LedgerHost, body: dict, heard: list, now: float) -> dict:
    return host.answer({**body, "pump": "p"}, lambda key, what: heard.append((key, what)), now)


def report(book: OfferBook, now: float) -> dict:
    seen = {"interval_s": 0.1, "delivered_bytes": 0, "sender": "p"}
    return {"op": "report", "seen": seen, "demand_bps": 0.0, "page": book.page()}


def test_a_release_that_was_lost_frees_its_promise_with_the_next_report() -> None:
    host, book, heard = pair()
    book.hear(said(host, book.ask("k", QUESTION, 0.0), heard, 0.0), 0.0)
    assert book.standing("k") is Standing.ADMITTED
    assert book.drop("k") is not None
    assert host.ledger.statistics().admitted == 1
    said(host, report(book, 0.1), heard, 0.1)
    assert host.ledger.statistics().admitted == 0


def test_a_question_that_was_lost_is_asked_again() -> None:
    host, book, heard = pair()
    book.ask("k", QUESTION, 0.0)
    news, again = book.hear(said(host, report(book, 0.3), heard, 0.3), 0.3)
    assert news == []
    news, _ = book.hear(said(host, again[0], heard, 0.3), 0.3)
    assert [(key, body["verdict"]) for key, body in news] == [("k", "admitted")]


def test_an_answer_that_was_lost_is_told_with_the_next_report_and_makes_no_second_promise() -> None:
    host, book, heard = pair()
    question = book.ask("k", QUESTION, 0.0)
    said(host, question, heard, 0.0)
    news, again = book.hear(said(host, report(book, 0.3), heard, 0.3), 0.3)
    assert [(key, body["verdict"]) for key, body in news] == [("k", "admitted")]
    assert again == []
    assert said(host, question, heard, 0.4)["verdict"] == "admitted"
    assert host.ledger.statistics().admitted == 1


def test_a_page_older_than_a_question_does_not_take_its_promise_away() -> None:
    host, book, heard = pair()
    old = report(book, 0.0)
    said(host, book.ask("k", QUESTION, 0.0), heard, 0.0)
    said(host, old, heard, 0.1)
    assert host.ledger.statistics().admitted == 1


def test_what_was_promised_before_the_host_restarted_has_its_place_again_and_newcomers_wait() -> None:
    _, book, heard = pair()
    before = LedgerHost(LINK, CONFIG, 0.0)
    whole = {"size_bytes": 10 * MB, "deadline_s": 3.0}
    book.hear(said(before, book.ask("k", whole, 0.0), heard, 0.0), 0.0)
    host = LedgerHost(LINK, CONFIG, 0.5)
    _, again = book.hear(said(host, report(book, 0.5), heard, 0.5), 0.5)
    book.hear(said(host, again[0], heard, 0.5), 0.5)
    assert book.standing("k") is Standing.ADMITTED
    newcomer = said(host, book.ask("new", {"size_bytes": 20 * MB, "deadline_s": 2.6}, 0.5), heard, 0.5)
    assert newcomer["verdict"] == "queued"


def test_what_no_longer_fits_after_a_restart_is_late_and_breaks_nobody_else() -> None:
    host, book, heard = pair()
    said(host, {"op": "offer", "key": "other", **QUESTION, "size_bytes": 18 * MB}, heard, 0.0)
    stands = {"op": "offer", "key": "k", "n": 7, "size_bytes": 10 * MB, "deadline_s": 1.5, "stands": True}
    assert said(host, stands, heard, 0.0)["verdict"] == "late"
    assert heard == []
    assert not host.ledger.is_late("other")
    assert len(book) == 0


def test_a_promise_made_alone_is_handed_over_once_the_host_is_back() -> None:
    host, book, heard = pair()
    book.ask("k", QUESTION, 0.0)
    book.decide("k", Standing.ADMITTED)
    _, again = book.hear(said(host, report(book, 2.0), heard, 2.0), 2.0)
    assert again[0]["stands"]
    assert said(host, again[0], heard, 2.0)["verdict"] in ("admitted", "late")
    assert host.ledger.statistics().admitted == 1


def test_what_waits_at_the_host_and_was_promised_alone_meanwhile_comes_back_as_promised() -> None:
    host, book, heard = pair()
    said(host, {"op": "offer", "key": "other", **QUESTION, "size_bytes": 15 * MB}, heard, 0.0)
    question = book.ask("k", {"size_bytes": 10 * MB, "deadline_s": 2.0}, 0.0)
    assert said(host, question, heard, 0.0)["verdict"] == "queued"  # its answer is lost
    book.decide("k", Standing.ADMITTED)
    _, again = book.hear(said(host, report(book, 0.3), heard, 0.3), 0.3)
    book.hear(said(host, again[0], heard, 0.3), 0.3)
    assert (host.ledger.statistics().admitted, host.ledger.statistics().queued) == (2, 0)
    assert book.standing("k") is Standing.LATE


def test_a_release_that_comes_late_does_not_end_the_next_offer_by_the_same_name() -> None:
    host, book, heard = pair()
    said(host, book.ask("k", QUESTION, 0.0), heard, 0.0)
    release = book.drop("k")
    said(host, book.ask("k", QUESTION, 0.1), heard, 0.1)
    assert release is not None
    said(host, release, heard, 0.2)
    assert host.ledger.statistics().admitted == 1


def test_more_offers_than_a_page_holds_go_in_turns_and_lose_nothing() -> None:
    config = CONFIG.model_copy(
        update={"admission": CONFIG.admission.model_copy(update={"nominal_bps": 1e12})}
    )
    host, book, heard = LedgerHost(LINK, config, 0.0), OfferBook(), []
    for n in range(K_PAGE_ROWS + 50):
        said(host, book.ask(f"k{n}", {"size_bytes": 1, "deadline_s": 60.0}, 0.0), heard, 0.0)
    book.drop("k3"), book.drop(f"k{K_PAGE_ROWS + 10}")
    sizes = []
    for _ in range(3):
        page = report(book, 0.1)
        sizes.append(len(page["page"]["rows"]) // 3)
        said(host, page, heard, 0.1)
    assert sizes == [K_PAGE_ROWS, 49 - 1, K_PAGE_ROWS]
    assert set(host._held) == {key for key, _ in book.standings()}


def test_a_report_of_a_later_version_that_says_more_gets_its_share() -> None:
    host, book, heard = pair()
    more = report(book, 0.1)
    more["seen"]["colour"] = "red"
    more["mood"] = "fine"
    answer = said(host, {**more, "demand_bps": 1e9}, heard, 0.1)
    assert answer["share"]["rate_bps"] > 0


def test_news_of_a_later_version_is_heard_as_far_as_it_is_known_here_and_nonsense_is_refused() -> None:
    book = OfferBook()
    book.ask("k", QUESTION, 0.0)
    for wrong in ({}, {"verdict": "maybe"}, {"verdict": []}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            book.hear({"op": "news", "key": "k", **wrong}, 0.1)
    news, _ = book.hear({"op": "news", "key": "k", "verdict": "admitted", "colour": "red"}, 0.1)
    assert news == [("k", {"verdict": "admitted"})]


@pytest.mark.parametrize(
    "page",
    [
        {"after": 0, "upto": 9},
        {"after": 0, "upto": 9, "rows": [1, 2]},
        {"after": 0, "upto": 9, "rows": [1, 2, -3]},
        {"after": 0, "upto": 9, "rows": [1, 2, "x"]},
        {"after": 0, "upto": 9, "rows": [1, 2, 3] * (K_PAGE_ROWS + 1)},
        {"after": "x", "upto": 9, "rows": []},
        7,
    ],
)
def test_a_page_that_is_none_is_refused_and_changes_nothing(page: object) -> None:
    host, book, heard = pair()
    said(host, book.ask("k", QUESTION, 0.0), heard, 0.0)
    with pytest.raises((KeyError, TypeError, ValueError)):
        host.page("p", page, 0.1)
    assert host.ledger.statistics().admitted == 1
