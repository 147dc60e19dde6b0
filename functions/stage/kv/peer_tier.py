"""Another instance of the same stage as a tier: where the gateway says that a conversation was held, it is read from there."""

import logging
import time
from typing import Final
from urllib.parse import urlsplit

from eventing.http.delivery import DeliveryError, Sender
from eventing.http.pod_network import PodNetwork
from eventing.problems import Problem
from eventing.wire.kv_query import HELD_HEADER, KVQuery
from eventing.wire.prefix_chain import BLOCK_TOKENS
from functions.stage.engine.tiers import Wanted
from functions.stage.kv.fetching import Away, Fetcher, FetchFailed
from functions.stage.models.kv_bytes import AlteredKV, CheckedKV, ForeignKV, put_kv
from storage.kv.parts import KVPart

_log: Final = logging.getLogger(__name__)

_NOTHING: Final = 204
_REST_SECONDS: Final = 1.0
"""For the few tokens behind the last whole block."""


class PeerClient:
    """Asks instances of one stage. Thread-safe."""

    def __init__(self, pods: PodNetwork, pipeline: str, layer: int, token: str) -> None:
        """pods: no other address gets the token. layer: the stage's first."""
        self._pods = pods
        self._pipeline = pipeline
        self._layer = layer
        self._headers = {"authorization": f"Bearer {token}"}
        self._sender = Sender(connect_timeout_seconds=1.0)

    def admits(self, peer: str) -> bool:
        parts = urlsplit(peer)
        if parts.scheme == "http" and self._pods.admits(parts.hostname or "", parts.port or 80):
            return True
        _log.warning("%s is not asked for keys and values: it is not in the pod network, %s", peer, self._pods)
        return False

    def ask(self, peer: str, wanted: Wanted, first: int, end: int, digest: bytes, deadline: float) -> tuple[memoryview, int]:
        """Bytes, none where they are not held there, and how many tokens of the very sequence are. Raises FetchFailed."""
        id_, attempt, source = wanted.sequence
        query = KVQuery(self._pipeline, self._layer, first, end, digest.hex(), id_, attempt, source)
        try:
            reply = self._sender.get(peer + query.target, self._headers, max(0.001, deadline - time.monotonic()))
        except (DeliveryError, Problem) as error:
            raise Away(f"{type(error).__name__}: {error}") from error
        held = reply.headers.get(HELD_HEADER, "")
        return reply.body if reply.status != _NOTHING else memoryview(b""), int(held) if held.isdecimal() else 0

    def close(self) -> None:
        self._sender.close()


class PeerTier:
    """Implements `Tier`."""

    name: Final = "peer"

    def __init__(self, peers: PeerClient, fetcher: Fetcher) -> None:
        self._peers = peers
        self._fetcher = fetcher

    def restore(self, wanted: Wanted) -> int:
        for peer in filter(self._peers.admits, wanted.peers):
            if wanted.lacks_blocks:
                asking = _Asking(self._peers, self._fetcher, peer, wanted)
                wanted = wanted.holding(self._fetcher.restore(wanted, asking.part, peer))
                if not wanted.lacks_blocks and not wanted.draws_by_tokens:
                    return asking.rest(wanted.held)
        return wanted.held


class _Asking:
    """One peer, for one sequence."""

    def __init__(self, peers: PeerClient, fetcher: Fetcher, peer: str, wanted: Wanted) -> None:
        self._peers = peers
        self._fetcher = fetcher
        self._peer = peer
        self._wanted = wanted
        self._held_there = 0

    def part(self, part: KVPart, deadline: float) -> CheckedKV | None:
        digest = self._wanted.chain[part.end - 1]
        return self._range(part.first * BLOCK_TOKENS, part.end * BLOCK_TOKENS, digest, deadline)

    def rest(self, held: int) -> int:
        """What a sequence that moves holds behind the whole blocks of its chain."""
        end = min(self._held_there, held + BLOCK_TOKENS - 1)
        if end <= held:
            return held
        try:
            found = self._range(held, end, b"", min(time.monotonic() + _REST_SECONDS, self._wanted.until))
        except FetchFailed as error:
            _log.info("%d tokens are computed again: %s", end - held, error)
            return held
        return held if found is None else self._wanted.at(lambda pool, handle: put_kv(pool, handle, found))

    def _range(self, first: int, end: int, digest: bytes, deadline: float) -> CheckedKV | None:
        data, held = self._peers.ask(self._peer, self._wanted, first, end, digest, deadline)
        self._held_there = max(held, self._held_there)
        try:
            return self._fetcher.checked(data, first, end) if data else None
        except (AlteredKV, ForeignKV) as error:
            raise FetchFailed(str(error)) from error
