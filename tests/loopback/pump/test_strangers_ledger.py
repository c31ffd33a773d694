"""What a ledger says is heard from the pump that keeps it, and from nobody else."""

from __future__ import annotations

import socket

import pytest

from prfaas.config.pump import PumpConfig, split_address
from prfaas.model.decisions import Verdict
from prfaas.model.errors import RemoteProtocolError
from prfaas.model.ids import LinkId
from prfaas.model.observations import LinkEstimate
from prfaas.pump.peer import Peer
from prfaas.pump.server import Pump
from prfaas.transfer import frames as f

K_HOST = "127.0.0.1:9"
LINK = str(LinkId("east", "west"))
SHARE = {
    "pump": "east", "rate_bps": 5e9, "bytes": 1, "ttl_s": 1.0, "floor_bps": 5e9, "serial": 1 << 60
}  # fmt: skip
LIES = [
    {"op": "share", "share": SHARE},
    {"op": "share", "share": {**SHARE, "from_a_later_version": 1}},
    {"op": "share", "share": {"rate_bps": "much"}},
    {"op": "share", "estimate": {"rate_bps": 5e9, "low_bps": 0.0, "high_bps": 0.0, "rtt_s": 0.0}},
    {"op": "share", "estimate": {"nonsense": []}},
    {"op": "share", "estimate": 7},
    {"op": "share", "unknown": 7, "news": [[]]},
    {"op": "news", "key": "k", "verdict": "refused"},
    {"op": "news"},
]


@pytest.fixture
def pump(tmp_path):
    links = [{"peer_site": "west", "host": K_HOST, "admission": {"nominal_bps": 80e6, "max_pumps": 3}}]
    config = PumpConfig.model_validate(
        {"site": "east", "control_socket": tmp_path / "east.sock", "links": links}
    )
    pump = Pump(config)
    yield pump
    pump.close()


def answer(body: dict, serial: int = 1) -> tuple[f.Header, memoryview]:
    frame = f.message_frame(2, f.FrameType.LEDGER, f.LedgerMessage(LINK, False, serial, body))
    return f.Header.from_bytes(frame[: f.K_HEADER_BYTES], 2), memoryview(frame[f.K_HEADER_BYTES :])


class Stream:
    """What the pump asks of the stream that an answer came on."""

    index, version, ready, waiting_to_write, session = 0, 2, False, False, None


@pytest.mark.parametrize("body", LIES)
def test_what_another_site_says_of_our_ledger_ends_its_stream_and_changes_nothing(pump, body):
    desk, now = pump.desks["west"], pump.loop.now()
    desk._asked[1] = now  # as if it had guessed the number of a question
    peer = Peer(pump, "127.0.0.1:10", now)
    peer.site = "west"
    with pytest.raises(RemoteProtocolError, match="ledger"):
        peer.on_frame(Stream(), *answer(body), now)
    assert desk.status(now)["share_bps"] == 0
    assert desk.estimate(now) is None
    assert not desk.status(now)["reachable"]
    peer.close(now)


@pytest.mark.parametrize("body", LIES)
def test_a_peer_that_dials_us_gets_no_hearing_for_answers(pump, body):
    sock = socket.create_connection(split_address(pump.address))
    hello = f.Hello(1, 2, b"sixteen bytes ok", "west", "127.0.0.1:1", 0)
    said = f.LedgerMessage(LINK, False, 1, body)
    sock.sendall(f.message_frame(1, f.FrameType.HELLO, hello) + f.message_frame(2, f.FrameType.LEDGER, said))
    for _ in range(50):
        pump.loop.turn(0.01)
        if pump.inbound.counters.streams_lost:
            break
    assert pump.inbound.counters.streams_lost == 1
    assert not pump.desks["west"].status(pump.loop.now())["reachable"]
    sock.close()


@pytest.mark.parametrize("body", LIES)
def test_the_keeper_itself_may_talk_nonsense_or_a_later_version_and_the_pump_lives(pump, body):
    desk, now = pump.desks["west"], pump.loop.now()
    desk._asked[1] = now
    keeper = Peer(pump, K_HOST, now)
    keeper.site = "east"
    keeper.on_frame(Stream(), *answer(body), now)
    share_bps = desk.status(now)["share_bps"]
    assert share_bps == (SHARE["rate_bps"] if body.get("share", {}).get("serial") else 0)
    told = desk.estimate(now)
    assert told is None or isinstance(told, LinkEstimate)
    pump.loop.turn(0.01)
    news: list[dict] = []
    desk.offer("k", {"size_bytes": 1, "deadline_s": 9.0}, lambda _, what: news.append(what), now + 10)
    assert news[0]["verdict"] == Verdict.ADMITTED.value  # alone, against its floor or its share
    keeper.close(now)
