"""Which of SGLang's own connections go by a pump, and by which."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from prfaas.config.backend import BackendConfig
from prfaas.model.errors import PrfaasError
from prfaas.sglang import passage
from prfaas.sglang.passage import K_NOWHERE, Passage


class Pump:
    """Forwards to ports that tell the endpoints apart."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, int]] = []
        self.away = False

    def forward(self, peer: str, host: str, port: int, *, timeout_s: float) -> str:
        if self.away:
            raise PrfaasError("the pump doesn't answer")
        if (peer, host, port) not in self.asked:
            self.asked.append((peer, host, port))
        return f"127.0.0.1:{40001 + self.asked.index((peer, host, port))}"


@pytest.fixture
def pump() -> Pump:
    return Pump()


def test_named_hosts_go_by_their_pumps_and_others_as_they_are(pump):
    way = Passage(pump, {"10.0.1.1": "10.0.1.1:7700", "fd00::1": "[fd00::2]:7700"})
    assert way.address("10.0.1.1:8998") == "127.0.0.1:40001"
    assert way.endpoint("tcp://[fd00::1]:8998") == "tcp://127.0.0.1:40002"
    assert way.address("10.0.9.9:8998") == "10.0.9.9:8998"
    assert way.endpoint("tcp://10.0.9.9:1") == "tcp://10.0.9.9:1"
    assert pump.asked == [("10.0.1.1:7700", "10.0.1.1", 8998), ("[fd00::2]:7700", "fd00::1", 8998)]


def test_an_address_leads_to_the_same_place_every_time_and_a_lead_to_itself(pump):
    way = Passage(pump, {"127.0.0.1": "127.0.0.1:7700"})
    lead = way.address("127.0.0.1:8998")
    assert way.address("127.0.0.1:8998") == lead
    assert way.address(lead) == lead
    assert way.behind(lead) == "127.0.0.1:8998"
    assert way.behind("10.0.0.1:1") == "10.0.0.1:1"
    assert len(pump.asked) == 1


def test_a_way_is_known_once_it_was_asked_for_or_where_none_is_needed(pump):
    way = Passage(pump, {"10.0.1.1": "10.0.1.1:7700"})
    assert not way.is_known("tcp://10.0.1.1:8998")
    lead = way.address("10.0.1.1:8998")
    assert way.is_known("tcp://10.0.1.1:8998")
    assert not way.is_known("tcp://10.0.1.1:8999")
    assert way.is_known(f"tcp://{lead}")
    assert way.is_known("tcp://10.0.9.9:1")
    assert way.is_known("tcp://no port")


def test_who_waits_for_the_pump_keeps_no_other_waiting(pump, monkeypatch):
    """The other may be the one that hears the pump."""
    way, seen = Passage(pump, {"10.0.1.1": "10.0.1.1:7700"}), []

    def ask(*_: object, **__: object) -> str:
        other = threading.Thread(target=lambda: seen.append(way.is_known("tcp://10.0.1.1:8998")))
        other.start()
        other.join(5)
        return "127.0.0.1:40001"

    monkeypatch.setattr(pump, "forward", ask)
    assert way.address("10.0.1.1:8998") == "127.0.0.1:40001"
    assert seen == [False]


def test_what_should_go_by_a_pump_and_cannot_goes_nowhere_until_it_can(pump):
    way = Passage(pump, {"10.0.1.1": "10.0.1.1:7700"})
    pump.away = True
    assert way.address("10.0.1.1:8998") == K_NOWHERE
    pump.away = False
    assert way.address("10.0.1.1:8998") == "127.0.0.1:40001"


def test_a_pump_that_does_not_answer_holds_the_scheduler_up_once_in_a_while_not_for_each_request(
    pump, monkeypatch
):
    now = SimpleNamespace(s=0.0, waited=0)

    def wait(*_: object, timeout_s: float, **__: object) -> str:
        now.s += timeout_s
        now.waited += 1
        raise PrfaasError("the pump doesn't answer")

    monkeypatch.setattr(passage.time, "monotonic", lambda: now.s)
    way = Passage(pump, {"10.0.1.1": "10.0.1.1:7700"})
    lead, answer = way.address("10.0.1.1:5000"), pump.forward
    monkeypatch.setattr(pump, "forward", wait)
    assert [way.address(f"10.0.1.1:{port}") for port in range(6000, 6005)] == [K_NOWHERE] * 5
    assert (now.s, now.waited) == (passage.K_ANSWER_S, 1)
    assert way.address("10.0.9.9:1") == "10.0.9.9:1"
    monkeypatch.setattr(pump, "forward", answer)
    assert way.address("10.0.1.1:5000") == lead
    assert way.address("10.0.1.1:6000") == K_NOWHERE
    now.s += passage.K_SILENT_S
    assert way.address("10.0.1.1:6000") == "127.0.0.1:40002"


def test_a_peers_word_on_its_pump_counts_where_the_configuration_is_silent(pump):
    way = Passage(pump, {"10.0.1.1": "10.0.1.1:7700"})
    way.learn("10.0.1.1", "203.0.113.9:1")
    way.learn("10.0.2.1", "10.0.2.1:7700")
    first = way.address("10.0.2.1:5000")
    way.address("10.0.1.1:5000")
    assert [asked[0] for asked in pump.asked] == ["10.0.2.1:7700", "10.0.1.1:7700"]
    way.learn("10.0.2.1", "10.0.2.1:7700")
    assert way.address("10.0.2.1:5000") == first
    way.learn("10.0.2.1", "10.0.2.1:7800")  # its next pump
    assert way.address("10.0.2.1:5000") != first
    assert pump.asked[-1][0] == "10.0.2.1:7800"


def test_without_control_in_the_configuration_nothing_changes(pump):
    def original(req: SimpleNamespace) -> str:
        return f"{req.bootstrap_host}:{req.bootstrap_port}"

    req = SimpleNamespace(bootstrap_host="10.0.1.1", bootstrap_port=8998)
    passage.use(None)
    assert passage.bootstrap_address(original, req) == "10.0.1.1:8998"
    assert passage.here("tcp://10.0.1.1:5000") == "tcp://10.0.1.1:5000"
    try:
        passage.use(Passage(pump, {"10.0.1.1": "10.0.1.1:7700"}))
        assert passage.bootstrap_address(original, req) == "127.0.0.1:40001"
        assert passage.here("tcp://10.0.1.1:5000") == "tcp://127.0.0.1:40002"
    finally:
        passage.use(None)


def test_a_pump_that_is_no_address_is_refused_in_the_configuration():
    with pytest.raises(ValueError, match="is not host:port"):
        BackendConfig.model_validate({"control": {"pumps": {"10.0.1.1": "7700"}}})
    assert BackendConfig.model_validate({"control": {}}).control is not None


@pytest.mark.parametrize("address", ["", "no port", "a b:1", "10.0.1.1:99999"])
def test_what_is_no_address_is_left_for_sglang_to_refuse(pump, address):
    assert Passage(pump, {"10.0.1.1": "10.0.1.1:7700"}).address(address) == address
