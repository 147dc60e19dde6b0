"""Fetches the KV of a sequence from a tier.

Several parts of the KV are fetched at once, and written into the KV arena in their order.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import islice
from typing import Final

from eventing.wire.prefix_chain import BLOCK_TOKENS
from functions.stage.engine.kv_tiers import ComputeRate, RestoreRequest, smoothed
from functions.stage.models.kv_bytes import AlteredKV, CheckedKV, ForeignKV, checked, put_kv
from functions.stage.models.kv_cache import KVLayout
from storage.kv.parts import KVPart, most_blocks, parts_between

_log: Final = logging.getLogger(__name__)

_AWAY_SECONDS: Final = 5.0  # a peer that did not answer is not asked again for this time, so that few sequences wait for it
_AT_ONCE: Final = 4  # parts of one sequence that are requested together

LEAST_SECONDS: Final = 0.5  # shortest time limit of a fetch; with less time left none is begun
MOST_SECONDS: Final = 10.0  # longest time limit of a fetch, and the limit before the compute rate is known
_RELAXED: Final = 1.25  # divides the estimate of a tier that is not asked, so that it is asked again eventually
_ENOUGH_TOKENS: Final = 256  # smaller fetches do not measure a rate: most of their time is the round trip


class FetchFailed(Exception):
    """The tier's data cannot be used; the message says why. The tokens are computed instead."""


class TierAway(FetchFailed):
    """The tier did not answer in time. Do not ask it for some seconds, so that other sequences do not wait for it."""


Fetch = Callable[[KVPart, float], CheckedKV | None]
"""A function (part, deadline) that fetches one part of a chain's KV. The deadline is in time.monotonic().

Returns None if the tier does not hold the whole part. Raises FetchFailed.
"""


Observe = Callable[[str, int, float, bool], None]
"""A function (tier, bytes, seconds, failed) that records the outcome of each restore, for metrics."""


class FetchEstimate:
    """Estimates from recent measurements whether fetching KV from one tier is faster than computing it. Thread-safe."""

    def __init__(self, rate: ComputeRate) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._asking_seconds: float | None = None  # of a request that found nothing or few tokens
        self._seconds_per_token: float | None = None

    def time_limit(self, tokens: int) -> float | None:
        """Returns the time limit of a fetch of `tokens`, in seconds. None if computing them is expected to be faster."""
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
        """Counts one fetch. tokens: how many tokens were fetched; 0 if the tier held nothing. seconds: how long it took."""
        with self._lock:
            if tokens >= _ENOUGH_TOKENS:
                self._seconds_per_token = smoothed(self._seconds_per_token, seconds / tokens)
            else:
                self._asking_seconds = smoothed(self._asking_seconds, seconds)


@dataclass(slots=True)
class _Fetched:
    """The outcome of one fetch. If it failed, some parts may have been fetched before."""

    held: int  # tokens that the sequence holds now
    bytes: int = 0  # fetched
    failure: Exception | None = None  # why fetching ended early


class Fetcher:
    """Fetches KV from one tier, if that is expected to be faster than to compute the KV. Thread-safe."""

    def __init__(self, tier: str, layout: KVLayout, estimate: FetchEstimate, threads: Executor, observe: Observe) -> None:
        """Prepares to fetch KV from one tier.

        tier: name of the tier in metrics. layout: of the stage's own KV arena. threads: the threads that fetch parts.
        """
        self.layout = layout
        self._tier = tier
        self._estimate = estimate
        self._threads = threads
        self._observe = observe
        self._lock = threading.Lock()
        self._away_until: dict[str, float] = {}  # source → time.monotonic() from which it may be asked again

    def restore(self, request: RestoreRequest, fetch: Fetch, source: str) -> int:
        """Fetches the KV that the sequence lacks of its chain. Returns how many tokens the sequence then holds.

        Fetches nothing if computing is faster, the deadline is near, or `source` did not answer lately. A failure is logged and
        not raised; parts that were fetched before stay. fetch: fetches one part. source: name of the peer or store. Raises
        SequenceGone.
        """
        missing = len(request.chain) * BLOCK_TOKENS - request.held
        time_limit = self._estimate.time_limit(missing)
        began = time.monotonic()
        with self._lock:
            is_away = began < self._away_until.get(source, -math.inf)
        if time_limit is None or is_away or request.deadline - began < LEAST_SECONDS:
            return request.held
        deadline = min(began + time_limit, request.deadline)
        fetched = self._fetch_parts(request, fetch, deadline)
        if fetched.bytes:  # layers with windows may lack what they need of it
            fetched.held = request.with_cache(lambda pool, handle: pool.length(handle))
        seconds, tokens = time.monotonic() - began, fetched.held - request.held
        cut_short = deadline < began + time_limit and time.monotonic() >= deadline
        if not cut_short:  # a client's short deadline says nothing about the tier
            self._estimate.fetched(tokens, seconds)
            if isinstance(fetched.failure, TierAway):
                self._mark_away(source)
        if fetched.failure is not None:
            _log.warning("%d of %d tokens came from %s, the rest is computed: %s", tokens, missing, source, fetched.failure)
        self._observe(self._tier, fetched.bytes, seconds, fetched.failure is not None)
        return fetched.held

    def checked(self, data: bytes | bytearray | memoryview, first: int, end: int) -> CheckedKV:
        """Verifies that `data` is KV of tokens [first, end) in this stage's layout. Raises AlteredKV or ForeignKV."""
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
        """Fetches one part after the other, until a part is missing or fails, or the deadline has passed.

        deadline: in time.monotonic().
        """
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
    """Returns the greatest number of blocks in one part, which depends on the size of a token's KV.

    Peers and the store use the same number.
    """
    return most_blocks(layout.token_bytes * BLOCK_TOKENS)


def place(request: RestoreRequest, found: CheckedKV) -> int:
    """Writes fetched KV into the memory of the sequence. Returns how many tokens have then been written.

    Raises SequenceGone, and ValueError if tokens before `found` are missing.
    """
    return request.with_cache(lambda pool, handle: put_kv(pool, handle, found))
