"""The tier of peers: fetches KV from other instances of the same stage.

The gateway names the instances that may hold a sequence's KV. `PeerTier` asks them, and `hand_over` answers such a request.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Protocol, TypeVar
from urllib.parse import urlsplit

from eventing.http.delivery import DeliveryError, Sender
from eventing.http.pod_network import PodNetwork
from eventing.http.pod_tls import PodTLS
from eventing.problems import Problem
from eventing.wire.kv_query import HELD_HEADER, KVQuery
from eventing.wire.prefix_chain import BLOCK_TOKENS, DIGEST_BYTES, under
from functions.stage.engine.kv_tiers import RestoreRequest
from functions.stage.engine.sequences import SequenceTable
from functions.stage.kv.fetching import Fetcher, FetchFailed, TierAway, place
from functions.stage.models.kv_bytes import AlteredKV, CheckedKV, ForeignKV, copied_kv, stamp
from storage.kv.parts import KVPart

_log: Final = logging.getLogger(__name__)

T = TypeVar("T")

_NO_CONTENT: Final = 204  # HTTP status of a peer that does not hold the KV
_REST_SECONDS: Final = 1.0  # time limit for the few tokens after the last whole block


class SequenceReader(Protocol):
    """The part of `Engine` that `hand_over` needs. See `Engine.with_sequences`."""

    def with_sequences(self, action: Callable[[SequenceTable], T]) -> T: ...


def hand_over(query: KVQuery, engine: SequenceReader) -> tuple[bytearray, int] | None:
    """Answers another instance of this stage, which asks for the KV of a range of tokens. None if this instance lacks them.

    Returns the KV in the format of `kv_bytes`, and how many tokens of KV the named sequence has here. That number is 0 if the
    KV was found by its digest, in another sequence with the same tokens.
    """
    found = engine.with_sequences(lambda sequences: _copied(query, sequences))
    if found is not None:
        stamp(found[0])
    return found


def _copied(query: KVQuery, sequences: SequenceTable) -> tuple[bytearray, int] | None:
    pool = sequences.cache.blocks
    if pool is None or query.first % pool.layout.block_tokens:
        return None
    holder = None if query.id is None else sequences.holder(query.id, query.attempt, query.source, query.lineage)
    if holder is not None and holder[1] >= query.end:
        return copied_kv(pool, holder[0], query.first, query.end), holder[1]
    if not query.digest:
        return None
    (digest,) = under((bytes.fromhex(query.digest),), query.lineage)
    handle = sequences.cache.holder(digest, query.end // BLOCK_TOKENS)
    return None if handle is None else (copied_kv(pool, handle, query.first, query.end), 0)


class PeerClient:
    """Asks other instances of one stage for KV. Thread-safe."""

    def __init__(
        self, pods: PodNetwork, pipeline: str, layer: int, token: str, tls: PodTLS | None = None, token_seconds: float = 0.0
    ) -> None:
        """Prepares to ask instances of one stage, without connecting to any.

        pods: the addresses that may be asked; these get the token. layer: first layer of the stage.
        token: the secret of the pipeline. tls: given if `pods` are reached over https. token_seconds: how long the emulated
        link of a `SleepGroup` takes for the KV of one token; 0 for real stages.
        """
        self._pods = pods
        self._pipeline = pipeline
        self._layer = layer
        self._headers = {"authorization": f"Bearer {token}"}
        self._sender = Sender(connect_timeout_seconds=1.0, tls=tls)
        self._token_seconds = token_seconds
        self._link = threading.Lock()  # an emulated link carries one reply at a time

    def admits(self, peer: str) -> bool:
        """Whether the URL of a peer is in the pod network, so that the peer may get the token. Logs a warning if not."""
        parts = urlsplit(peer)
        if parts.scheme == self._pods.scheme and self._pods.admits(parts.hostname or "", parts.port or 0):
            return True
        _log.warning("%s is not asked for keys and values: it is not in the pod network, %s", peer, self._pods)
        return False

    def ask(
        self, peer: str, request: RestoreRequest, first: int, end: int, digest: bytes, deadline: float
    ) -> tuple[memoryview, int]:
        """Asks a peer for the KV of tokens [first, end).

        Returns the bytes, which are not verified, and how many tokens of this sequence the peer holds. The bytes are empty if
        the peer lacks the KV. digest: of the block that ends at `end`. The peer looks for the id of the sequence and for the
        digest; if `digest` is empty, for the id alone. deadline: in time.monotonic(). Raises TierAway.
        """
        id_, attempt, source = request.sequence
        of_tokens = digest[:DIGEST_BYTES].hex()
        query = KVQuery(self._pipeline, self._layer, first, end, request.lineage, of_tokens, id_, attempt, source)
        try:
            reply = self._sender.get(peer + query.target, self._headers, max(0.001, deadline - time.monotonic()))
        except (DeliveryError, Problem) as error:
            raise TierAway(f"{type(error).__name__}: {error}") from error
        if self._token_seconds and reply.status != _NO_CONTENT:
            with self._link:
                time.sleep(max(0.0, min((end - first) * self._token_seconds, deadline - time.monotonic())))
        held = reply.headers.get(HELD_HEADER, "")
        return reply.body if reply.status != _NO_CONTENT else memoryview(b""), int(held) if held.isdecimal() else 0

    def close(self) -> None:
        self._sender.close()


class PeerTier:
    """Implements `Tier` by asking the peers that a request names, one after the other."""

    name: Final = "peer"

    def __init__(self, peers: PeerClient, fetcher: Fetcher) -> None:
        self._peers = peers
        self._fetcher = fetcher

    def restore(self, request: RestoreRequest) -> int:
        for peer in filter(self._peers.admits, request.peers):
            if request.lacks_blocks:
                restore = _PeerRestore(self._peers, self._fetcher, peer, request)
                request = replace(request, held=self._fetcher.restore(request, restore.part, peer))
                if not request.lacks_blocks and not request.draws_by_tokens:
                    return restore.rest(request.held)
        return request.held


class _PeerRestore:
    """Fetches the KV of one sequence from one peer."""

    def __init__(self, peers: PeerClient, fetcher: Fetcher, peer: str, request: RestoreRequest) -> None:
        self._peers = peers
        self._fetcher = fetcher
        self._peer = peer
        self._request = request
        self._held_by_peer = 0  # tokens of this sequence that the peer holds

    def part(self, part: KVPart, deadline: float) -> CheckedKV | None:
        """Fetches one part, as `Fetch` says."""
        digest = self._request.chain[part.end - 1]
        return self._range(part.first * BLOCK_TOKENS, part.end * BLOCK_TOKENS, digest, deadline)

    def rest(self, held: int) -> int:
        """Fetches the KV of tokens after the last whole block of the chain. Returns how many tokens the sequence then holds.

        Only the peer that the sequence migrates from can have such KV. held: how many tokens the sequence holds here already.
        Raises SequenceGone.
        """
        end = min(self._held_by_peer, held + BLOCK_TOKENS - 1)
        if end <= held:
            return held
        try:
            found = self._range(held, end, b"", min(time.monotonic() + _REST_SECONDS, self._request.deadline))
        except FetchFailed as error:
            _log.info("%d tokens are computed again: %s", end - held, error)
            return held
        return held if found is None else place(self._request, found)

    def _range(self, first: int, end: int, digest: bytes, deadline: float) -> CheckedKV | None:
        data, held = self._peers.ask(self._peer, self._request, first, end, digest, deadline)
        self._held_by_peer = max(held, self._held_by_peer)
        try:
            return self._fetcher.checked(data, first, end) if data else None
        except (AlteredKV, ForeignKV) as error:
            raise FetchFailed(str(error)) from error
