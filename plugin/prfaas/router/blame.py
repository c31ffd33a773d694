"""What a failed attempt says, and of whom: of the link between two sites, which rests then for everybody, or
of one server or one request.

SGLang tells a failed transfer by status 500 and a text, and most else that goes wrong by status 500 as well.
Of the link speak those texts alone that say that bytes, or an answer, didn't come across: ours by the reason
that our pumps give (sglang/rooms.py), and those of SGLang 0.5.23's own engines. Any other error may be the
server's or the request's. It was the server's if another one then serves the very request, and only then does
it count: whoever knows how to make servers fail can't take them from others by it, for such a request fails
at the next one as well. A server that brings nothing but errors so rests by itself, once others have served
what it failed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from prfaas.model.observations import Role
from prfaas.model.transfer import FailureReason
from prfaas.router.attempt import AttemptFailed, FailureKind, Route, Side
from prfaas.router.fleet import ServerHandle

if TYPE_CHECKING:
    from prfaas.router.ticket import Ticket

K_OF_THE_LINK = frozenset(
    {
        FailureReason.DEADLINE,
        FailureReason.PEER_UNREACHABLE,
        FailureReason.PEER_UNTRUSTED,
        FailureReason.CORRUPT,
        FailureReason.PUMP_LOST,
        FailureReason.VERSION,
    }
)
"""Reasons of a pump that the next transfer on the same way will meet as well."""
_OURS = re.compile(
    r"(?:transfer aborted: [^:]*|(?:transfer|prefill) failed): "
    r"(?P<reason>[a-z_]+(?: [a-z]+)*)(?:(?: \(|: )(?P<detail>[a-z_]*))?"
)
"""As the plugin's servers tell it, and profiled instances."""
_STOCK = re.compile(
    "|".join(
        (
            r"Failed to send (?:kv chunk|state components|aux data) of",
            r"remote mooncake session \S+ is not alive",
            r"Lost connection with prefill instance",
            r"is healthy before, but now it is down",
            r"timed out after [0-9.]+s in KVPoll\.",
            r"Timed out waiting for prefill completion",
            r"Could not fetch (?:bootstrap info|prefill parallel info)",
            r"to prefill \S+ failed",
            r"no answer from the prefill server's bootstrap",
            r"KV checksum mismatch",
        )
    )
)


def tells_of_link(failed: AttemptFailed) -> bool:
    """Whether another request by way of the same link would most likely fail as this attempt did."""
    if failed.kind is FailureKind.TIMEOUT:
        # A dead link is silent. Once prefill has ended its bytes are across, and decode is who is silent.
        return failed.side is Side.PREFILL
    return failed.kind is FailureKind.SERVER and _is_of_link(failed.message)


def _is_of_link(text: str) -> bool:
    found = _OURS.search(text)
    if found is None:
        return _STOCK.search(text) is not None
    reason = found["reason"].strip().replace(" ", "_")
    if reason == FailureReason.LEASE_ENDED:
        reason = found["detail"]  # why it has: past its time, or at its owner's word
    return reason in K_OF_THE_LINK


def is_own_error(failed: AttemptFailed) -> bool:
    """Whether it is an error of that server's own. Decode's word for a failed transfer doesn't tell whose."""
    if failed.kind is not FailureKind.SERVER or tells_of_link(failed):
        return False
    return failed.side is Side.PREFILL or "KVTransferError" not in failed.message


def is_decodes_alone(failed: AttemptFailed) -> bool:
    """Whether prefill had no part in it: another decode server may do, with the same prefill."""
    kinds = (FailureKind.CONNECT, FailureKind.REFUSED, FailureKind.TIMEOUT)
    return failed.side is Side.DECODE and failed.kind in kinds


def blame_servers(
    ticket: Ticket, route: Route, failed: AttemptFailed, now: float, cool_down_s: float
) -> ServerHandle:
    """Have the servers of a failed attempt be second choice for this request, and one that isn't there rest;
    the one that failed it, as far as that can be told.
    """
    culprit = route.decode if failed.side is Side.DECODE or route.prefill is None else route.prefill
    if failed.kind is FailureKind.CONNECT:
        culprit.mark_down(now, cool_down_s, f"{culprit.url}: {failed.message}")
    elif is_own_error(failed):
        ticket.suspects[culprit.name] = culprit
    # Inside a site an error answer doesn't tell which of the two failed: both become second choice.
    for one in (route.decode, route.prefill):
        if one is not None:
            ticket.blame[one.name] = ticket.blame.get(one.name, 0) + 1
    return culprit


def judge_servers(ticket: Ticket, now: float, cool_down_s: float) -> None:
    """The attempt has its first token. Its servers are well, and who failed the request before did so by
    itself, unless two of a kind did.
    """
    route = ticket.route
    served = [one for one in (route.decode, route.prefill) if one is not None] if route is not None else []
    for one in served:
        one.on_answered()
    for decodes in (False, True):
        failed = [one for one in ticket.suspects.values() if (one.role is Role.DECODE) is decodes]
        if len(failed) == 1 and failed[0] not in served:
            failed[0].on_error(now, cool_down_s)
    ticket.suspects.clear()


def least_blamed(ticket: Ticket, handles: list[ServerHandle]) -> list[ServerHandle]:
    """Those that had part in the fewest failed attempts of this request."""
    if not ticket.blame or not handles:
        return handles
    least = min(ticket.blame.get(one.name, 0) for one in handles)
    return [one for one in handles if ticket.blame.get(one.name, 0) == least]
