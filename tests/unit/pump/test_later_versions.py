"""What a pump or a ledger of a later version says ends what it ends, though its reason isn't known here."""

from __future__ import annotations

import threading
from contextlib import closing

from prfaas.model.decisions import RefusalReason, Verdict
from prfaas.model.transfer import FailureReason
from prfaas.pump_client import Offer, Transfer
from prfaas.pump_client import messages as m
from prfaas.pump_client.guard import GuardTable
from prfaas.pump_client.standing import Standing


def test_a_transfer_that_ended_for_an_unknown_reason_has_ended() -> None:
    with closing(GuardTable()) as guards:
        standing = Standing(threading.RLock(), guards)
        transfer, mark = Transfer(7), guards.take()
        standing.add_transfer(
            transfer, m.Submit(7, "", 1, 0, 1, b"", 1, "kv", 1.0, b"", b"", b"", guard_slot=mark[0],
                               guard_word=mark[1])
        )  # fmt: skip
        standing.hear(m.Ended(7, False, "eaten_by_a_whale", "in deep water", 10, 0, 0.1))
        assert transfer.outcome is not None
        assert not transfer.outcome.ok
        assert transfer.outcome.reason is FailureReason.BAD_REQUEST
        assert transfer.outcome.detail == "eaten_by_a_whale: in deep water"


def test_an_offer_that_was_refused_for_an_unknown_reason_is_refused() -> None:
    offer, heard = Offer("k", "west"), []
    offer.add_callback(heard.append)
    offer.hear("refused", "the-tide-is-out", 3.0, None)
    assert offer.wait(0) is Verdict.REFUSED
    assert offer.reason is RefusalReason.BAD_REQUEST
    assert offer.retry_after_s == 3.0
    assert heard == [offer]
