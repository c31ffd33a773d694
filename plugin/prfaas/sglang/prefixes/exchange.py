"""What servers ask each other for, and the router asks of them: `take` a prefix from a peer, `give` it to
one.

The taker makes room in its store, leases that to the giver and asks for what it lacks; the giver sends out of
its own store, by the pumps, what it has from the beginning on. A recurrent state is of use at the prefix's
exact end alone: without it a hybrid model's pages are of no use, and none is sent. Ranks give to the same
rank elsewhere; a server's first rank has the others take theirs.

Nothing here waits on the scheduler's thread, and the scheduler waits for nothing here.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from prfaas.config.pump import split_address
from prfaas.model.decisions import Verdict
from prfaas.model.errors import PrfaasError
from prfaas.model.transfer import LeaseGrant, TransferKind
from prfaas.pump_client import Offer, PumpClient
from prfaas.sglang.prefixes.pools import K_PAGES, K_STATES
from prfaas.sglang.prefixes.store import Chunk, Key, PrefixStore

logger = logging.getLogger(__name__)

K_TAKE, K_GIVE = "/prfaas/take_prefix", "/prfaas/give_prefix"
K_CODECS: dict[str, Any] = {K_TAKE: msgspec.json, K_GIVE: msgspec.msgpack}
"""The second goes across the link, with a key for each page."""
K_MOST_S = 600.0
K_KEPT_S = 30.0
"""What was taken stays for so long at least: the request that it was taken for is on its way."""
Answer = TypeVar("Answer", bound=msgspec.Struct)
Seconds = Annotated[float, msgspec.Meta(gt=0, le=K_MOST_S)]


class Refused(PrfaasError):
    """A question that can't be answered as it was meant; `status` is HTTP's."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Same(msgspec.Struct, frozen=True, kw_only=True):
    """What two servers must have in common."""

    model: str
    page_tokens: int
    item_bytes: dict[str, int]
    """By pool; of one rank."""
    ranks: int


class Take(msgspec.Struct, frozen=True, kw_only=True):
    """The router's question, and a first rank's to its others."""

    input_ids: list[int]
    giver: str
    """host:port where the giver's first rank answers."""
    within_s: Seconds = 60.0
    rank: int | None = None
    """Only that one, which is asked."""


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    tokens: int
    """Of the prefix, from its beginning on, that this server has now and can use."""
    moved_bytes: int


class Give(msgspec.Struct, frozen=True, kw_only=True):
    """A taker's question to the same rank of a giver."""

    same: Same
    pages: list[Key]
    """Keys of pages that it lacks, in order: addressed one after the other."""
    state: Key | None
    """Key of the state that it lacks, at the prefix's end."""
    grant: str
    page_address: int
    state_address: int
    within_s: Seconds


class Given(msgspec.Struct, frozen=True, kw_only=True):
    pages: int
    state: bool
    sent_bytes: int


@dataclass(frozen=True)
class Own:
    """What a rank knows of itself and of its server."""

    same: Same
    rank: int
    listen: str
    """host:port where its first rank answers; each of the others one port further."""


class Exchange:
    """One rank's. Methods block, and may be called from any thread."""

    def __init__(
        self,
        own: Own,
        client: PumpClient,
        store: PrefixStore,
        keys_of: Callable[[Sequence[int]], list[Key]],
        ask: Callable[[str, str, bytes, float], bytes],
    ) -> None:
        """`keys_of`: a prefix's keys, one a page. `ask(address, path, body, timeout_s)`: a peer's answer;
        raises Refused.
        """
        self._own, self._client, self._store = own, client, store
        self._keys_of, self._ask = keys_of, ask
        self._coming: dict[Key, threading.Event] = {}
        self._lock = threading.Lock()

    # Taking

    def take(self, wanted: Take) -> Taken:
        """Have a prefix of this prompt, from the giver what isn't here. Raises Refused."""
        ranks = self._own.same.ranks
        try:
            split_address(wanted.giver)
        except ValueError as error:
            raise Refused(400, f"giver: {error}") from None
        if wanted.rank is not None or ranks == 1:
            return self._take_own(wanted)
        with ThreadPoolExecutor(ranks) as pool:
            asked = [
                pool.submit(self._of_rank, rank, msgspec.structs.replace(wanted, rank=rank))
                for rank in range(ranks)
            ]
            found = [one.result() for one in asked]
        tokens = min(one.tokens for one in found)
        return Taken(tokens=tokens, moved_bytes=sum(one.moved_bytes for one in found))

    def _of_rank(self, rank: int, wanted: Take) -> Taken:
        if rank == self._own.rank:
            return self._take_own(wanted)
        return self._asked(address_of(self._own.listen, rank), K_TAKE, wanted, Taken)

    def _asked(self, address: str, path: str, question: Take | Give, kind: type[Answer]) -> Answer:
        codec = K_CODECS[path]
        said = self._ask(address, path, codec.encode(question), question.within_s)
        try:
            found: Answer = codec.decode(said, type=kind)
        except msgspec.MsgspecError as error:
            raise Refused(502, f"{address}: its answer can't be read: {error}") from None
        return found

    def _take_own(self, wanted: Take) -> Taken:
        began_s = time.monotonic()
        until_s = began_s + wanted.within_s
        keys = self._keys_of(wanted.input_ids)
        if not keys:
            return Taken(tokens=0, moved_bytes=0)
        # Two requests with one prefix: the second has what comes for the first.
        while (others := self._claim(keys[-1])) is not None:
            if not others.wait(max(0.0, until_s - time.monotonic())):
                raise Refused(504, "another request's transfer of this prefix isn't through")
        try:
            taken = self._fetch(keys, wanted, until_s)
            if taken.moved_bytes:
                took_s = time.monotonic() - began_s
                logger.info(
                    "prfaas: %d tokens of a prefix, %d bytes of them from %s in %.3f s",
                    taken.tokens, taken.moved_bytes, wanted.giver, took_s,
                )  # fmt: skip
            return taken
        finally:
            with self._lock:
                self._coming.pop(keys[-1]).set()

    def _claim(self, key: Key) -> threading.Event | None:
        """Whom to wait for; None: the caller brings it."""
        with self._lock:
            if key not in self._coming:
                self._coming[key] = threading.Event()
                return None
            return self._coming[key]

    def _fetch(self, keys: list[Key], wanted: Take, until_s: float) -> Taken:
        same = self._own.same
        here = self._store.leading(K_PAGES, keys, until_s)
        lacks_state = K_STATES in same.item_bytes and not self._store.holds(K_STATES, keys[-1])
        if here == len(keys) and not lacks_state:
            return self._had(keys, 0)
        chunks: list[Chunk] = []
        try:
            pages = self._room(chunks, K_PAGES, keys[here:])
            state = self._room(chunks, K_STATES, keys[-1:] if lacks_state else [])
            given = self._received(chunks, pages, state, wanted, until_s)
        except BaseException:
            for chunk in chunks:
                self._store.give_back(chunk)
            raise
        if pages is not None:
            self._store.keep(pages, given.pages)
        if state is not None:
            self._store.keep(state, int(given.state))
        return self._had(keys, given.sent_bytes)

    def _room(self, chunks: list[Chunk], pool: str, keys: list[Key]) -> Chunk | None:
        if not keys:
            return None
        chunk = self._store.room(pool, keys, self._own.same.item_bytes[pool], time.monotonic())
        if chunk is None:
            raise Refused(503, f"no room for {len(keys)} {pool} in store_bytes")
        chunks.append(chunk)
        return chunk

    def _received(
        self, chunks: list[Chunk], pages: Chunk | None, state: Chunk | None, wanted: Take, until_s: float
    ) -> Given:
        within_s = max(0.001, until_s - time.monotonic())
        regions = [(chunk.address, chunk.size_bytes) for chunk in chunks]
        lease = self._client.grant_lease(secrets.randbits(62), 1, regions, within_s)
        try:
            question = Give(
                same=self._own.same,
                pages=[] if pages is None else list(pages.keys),
                state=None if state is None else state.keys[0],
                grant=lease.grant.to_text(),
                page_address=0 if pages is None else pages.address,
                state_address=0 if state is None else state.address,
                within_s=within_s,
            )
            peer = address_of(wanted.giver, self._own.rank)
            given = self._asked(peer, K_GIVE, question, Given)
            if not lease.wait(max(0.0, until_s - time.monotonic())):
                raise Refused(504, f"not whole in time: {lease.failure}")
            came = sum(arrival.payload_bytes for arrival in lease.arrivals)
            if came != given.pages * _item(pages) + given.state * _item(state):
                raise Refused(502, f"the giver says {given}, and {came} bytes came")
            return given
        finally:
            lease.revoke()

    def _had(self, keys: list[Key], moved_bytes: int) -> Taken:
        """What a request can use now."""
        keep_until_s = time.monotonic() + K_KEPT_S
        pages = self._store.leading(K_PAGES, keys, keep_until_s)
        if K_STATES in self._own.same.item_bytes:
            state = self._store.leading(K_STATES, keys[-1:], keep_until_s)
            pages = pages if state and pages == len(keys) else 0
        return Taken(tokens=pages * self._own.same.page_tokens, moved_bytes=moved_bytes)

    # Giving

    def give(self, asked: Give) -> Given:
        """Send what is here of it. Raises Refused."""
        self._must_fit(asked.same)
        try:
            grant = LeaseGrant.from_text(asked.grant)
        except (ValueError, PrfaasError) as error:
            raise Refused(400, f"grant: {error}") from None
        until_s = time.monotonic() + asked.within_s
        held = self._store.leading(K_PAGES, asked.pages)
        states = [] if asked.state is None else [asked.state]
        if states and (held < len(asked.pages) or not self._store.holds(K_STATES, states[0])):
            raise Refused(409, f"no state at its end is here, or not all pages before it ({held})")
        if not held and not states:
            raise Refused(409, "none of it is here")
        keys = asked.pages[:held]
        try:
            sent_bytes = self._send(asked, grant, keys, states, until_s)
        except KeyError:
            raise Refused(409, "it was evicted just now") from None
        return Given(pages=held, state=bool(states), sent_bytes=sent_bytes)

    def _must_fit(self, theirs: Same) -> None:
        ours = self._own.same
        if theirs != ours:
            names = ("model", "page_tokens", "item_bytes", "ranks")
            wrong = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
            told = "; ".join(
                f"{name}: {getattr(ours, name)}, taker {getattr(theirs, name)}" for name in wrong
            )
            raise Refused(400, f"the taker's caches are others: {told}")

    def _send(
        self, asked: Give, grant: LeaseGrant, keys: list[Key], states: list[Key], until_s: float
    ) -> int:
        sizes = self._own.same.item_bytes
        todo = [
            one
            for one in (
                (TransferKind.KV, K_PAGES, keys, asked.page_address),
                (TransferKind.STATE, K_STATES, states, asked.state_address),
            )
            if one[2]
        ]
        total = sum(sizes[pool] * len(items) for _, pool, items, _ in todo)
        offer = self._promised(grant.site, total, until_s)
        try:
            for kind, pool, items, target in todo:
                last = kind is todo[-1][0]
                self._send_items(grant, (kind, pool, items, target), until_s, offer if last else None)
        except BaseException:
            self._client.release(offer)
            raise
        return total

    def _send_items(
        self, grant: LeaseGrant, part: tuple[TransferKind, str, list[Key], int], until_s: float,
        offer: Offer | None,
    ) -> None:  # fmt: skip
        """Of one pool; with the offer, the last of them. Raises Refused, KeyError."""
        kind, pool, items, target = part
        size, within_s = np.uint64(self._own.same.item_bytes[pool]), max(0.001, until_s - time.monotonic())
        with self._store.reading(pool, items) as runs:
            first, counts, sources = (
                np.array([getattr(run, name) for run in runs], dtype=np.uint64)
                for name in ("first", "count", "address")
            )
            transfer = self._client.submit(
                grant, sources, np.uint64(target) + first * size, counts * size,
                kind=kind, deadline_s=within_s, last=offer is not None, offer=offer,
            )  # fmt: skip
            outcome = transfer.wait(within_s + 1.0)
            if outcome is None:
                self._client.cancel(transfer)
        if outcome is None or not outcome.ok:
            raise Refused(502, f"not sent: {outcome}")

    def _promised(self, site: str, size_bytes: int, until_s: float) -> Offer:
        """The link's ledger has a place for it. Raises Refused."""
        within_s = max(0.001, until_s - time.monotonic())
        offer = self._client.offer(site, size_bytes, within_s)
        settled = threading.Event()
        offer.add_callback(lambda offer: settled.set() if offer.verdict is not Verdict.QUEUED else None)
        if not settled.wait(within_s) or offer.verdict is not Verdict.ADMITTED:
            self._client.release(offer)
            raise Refused(503, f"link to {site}: {offer.reason or 'no place in time'}")
        return offer


def _item(chunk: Chunk | None) -> int:
    return 0 if chunk is None else chunk.item_bytes


def address_of(address: str, rank: int) -> str:
    """Where another rank of the server answers whose first one answers at `address`. Raises ValueError."""
    host, port = split_address(address)
    return f"[{host}]:{port + rank}" if ":" in host else f"{host}:{port + rank}"
