"""Fetches parts of a conversation's keys and values from a tier into the arena: several at once, placed in their order."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import islice
from typing import Final, Protocol

from eventing.wire.prefix_chain import BLOCK_TOKENS
from functions.stage.engine.kv_tiers import ComputeRate, RestoreRequest, smoothed
from functions.stage.models.kv_bytes import AlteredKV, CheckedKV, ForeignKV, checked, put_kv
from functions.stage.models.kv_cache import KVLayout
from storage.kv.parts import KVPart, most_blocks, parts_between

_log: Final = logging.getLogger(__name__)

_AWAY_SECONDS: Final = 5.0  # a peer that did not answer is not asked again: sequences that move together wait for it once
_AT_ONCE: Final = 4  # parts of one sequence that are requested together

LEAST_SECONDS: Final = 0.5
MOST_SECONDS: Final = 10.0  # time limit of a fetch, also before the compute rate is known
_RELAXED: Final = 1.25
_ENOUGH_TOKENS: Final = 256  # smaller fetches say nothing about a rate: most of their time is the round trip


class FetchFailed(Exception):
    """The tier's data cannot be used; the message says why. The tokens are computed instead."""


class TierAway(FetchFailed):
    """Nothing came, or not in time. Other sequences need not wait for the same."""


Fetch = Callable[[KVPart, float], CheckedKV | None]
"""Fetches a part by a deadline in time.monotonic(). None: the tier does not hold it. Raises FetchFailed."""


class Observe(Protocol):
    """Receives the outcome of each restore, for metrics."""

    def __call__(self, tier: str, *, num_bytes: int, seconds: float, failed: bool) -> None: ...


class FetchEstimate:
    """Estimates whether fetching from one tier is faster than computing, from what both took lately. Thread-safe."""

    def __init__(self, rate: ComputeRate) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._asking_seconds: float | None = None  # to hear that something is not held, or to get a little
        self._seconds_per_token: float | None = None

    def time_limit(self, tokens: int) -> float | None:
        """Most seconds to wait for so many tokens; None: computing them is faster."""
        computing = self._rate.seconds(tokens)
        if computing is None:
            return MOST_SECONDS
        with self._lock:
            fetching = max(self._asking_seconds or 0.0, tokens * (self._seconds_per_token or 0.0))
            if fetching > computing:
                # When fetching loses, lower its estimate, so that it is tried again eventually.
                self._asking_seconds = (self._asking_seconds or 0.0) / _RELAXED
                self._seconds_per_token = (self._seconds_per_token or 0.0) / _RELAXED
                return None
        return min(MOST_SECONDS, max(LEAST_SECONDS, computing))

    def fetched(self, tokens: int, seconds: float) -> None:
        """tokens: 0 if the tier held nothing."""
        with self._lock:
            if tokens >= _ENOUGH_TOKENS:
                self._seconds_per_token = smoothed(self._seconds_per_token, seconds / tokens)
            else:
                self._asking_seconds = smoothed(self._asking_seconds, seconds)


@dataclass(slots=True)
class _Fetched:
    held: int  # tokens of the sequence
    bytes: int = 0
    failure: Exception | None = None


class Fetcher:
    """Fetches from one tier. Thread-safe."""

    def __init__(self, tier: str, layout: KVLayout, estimate: FetchEstimate, threads: Executor, observe: Observe) -> None:
        self.layout = layout
        self._tier = tier
        self._estimate = estimate
        self._threads = threads
        self._observe = observe
        self._lock = threading.Lock()
        self._away_until: dict[str, float] = {}

    def restore(self, request: RestoreRequest, fetch: Fetch, source: str) -> int:
        """Tokens of the sequence that are held afterwards. source: name of the peer or store. Raises SequenceGone."""
        missing = len(request.chain) * BLOCK_TOKENS - request.held
        time_limit = self._estimate.time_limit(missing)
        began = time.monotonic()
        with self._lock:
            is_away = began < self._away_until.get(source, -math.inf)
        if time_limit is None or is_away or request.deadline - began < LEAST_SECONDS:
            return request.held
        deadline = min(began + time_limit, request.deadline)
        fetched = self._fetch_parts(request, fetch, deadline)
        seconds, tokens = time.monotonic() - began, fetched.held - request.held
        cut_short = deadline < began + time_limit and time.monotonic() >= deadline
        if not cut_short:  # a client's short deadline says nothing about the tier
            self._estimate.fetched(tokens, seconds)
            if isinstance(fetched.failure, TierAway):
                self._mark_away(source)
        if fetched.failure is not None:
            _log.warning("%d of %d tokens came from %s, the rest is computed: %s", tokens, missing, source, fetched.failure)
        self._observe(self._tier, num_bytes=fetched.bytes, seconds=seconds, failed=fetched.failure is not None)
        return fetched.held

    def checked(self, data: bytes | bytearray | memoryview, first: int, end: int) -> CheckedKV:
        """Verifies that `data` is of tokens [first, end). Raises AlteredKV or ForeignKV."""
        found = checked(self.layout, data)
        if (found.first, found.end) != (first, end):
            raise ForeignKV(f"tokens {found.first} to {found.end} in place of {first} to {end}")
        return found

    def _mark_away(self, source: str) -> None:
        now = time.monotonic()
        with self._lock:
            self._away_until = {known: until for known, until in self._away_until.items() if until > now}
            self._away_until[source] = now + _AWAY_SECONDS

    def _fetch_parts(self, request: RestoreRequest, fetch: Fetch, deadline: float) -> _Fetched:
        """Keeps what has come by the deadline."""
        parts = deque(parts_between(request.held // BLOCK_TOKENS, len(request.chain), part_blocks(self.layout)))
        requested: dict[KVPart, Future[CheckedKV | None]] = {}
        fetched = _Fetched(request.held)
        try:
            while parts:
                for part in islice(parts, _AT_ONCE):
                    if part not in requested:
                        requested[part] = self._threads.submit(fetch, part, deadline)
                part = parts.popleft()
                try:
                    found = requested.pop(part).result(max(0.0, deadline - time.monotonic()))
                except TimeoutError as error:
                    raise TierAway("it did not come in time") from error
                if found is None:  # not held as a whole: look for its halves, and for nothing after it
                    parts = deque(half for half in part.halves() if half.end * BLOCK_TOKENS > fetched.held)
                else:
                    fetched.held = place(request, found)
                    fetched.bytes += len(found.payload)
        except (FetchFailed, AlteredKV, ForeignKV, ValueError) as error:
            fetched.failure = error
        finally:
            for future in requested.values():
                future.cancel()
        return fetched


def part_blocks(layout: KVLayout) -> int:
    """Most blocks of a part in this layout, at peers and in the store."""
    return most_blocks(layout.token_bytes * BLOCK_TOKENS)


def place(request: RestoreRequest, found: CheckedKV) -> int:
    """Writes what was fetched into the arena. Returns the tokens held afterwards. Raises SequenceGone."""
    return request.with_cache(lambda pool, handle: put_kv(pool, handle, found))
