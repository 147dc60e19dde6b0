"""Parts of a conversation out of another tier into the arena: several at once, put in their order, as far as they are there."""

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
from functions.stage.engine.tiers import Wanted
from functions.stage.kv.worth import LEAST_SECONDS, Worth
from functions.stage.models.kv_bytes import AlteredKV, CheckedKV, ForeignKV, checked, put_kv
from functions.stage.models.kv_layout import KVLayout
from storage.kv.parts import KVPart, most_blocks, parts_between

_log: Final = logging.getLogger(__name__)

_LEFT_ALONE_SECONDS: Final = 5.0
"""Who did not answer: many sequences that move together wait for a dead peer once."""
_AT_ONCE: Final = 4
"""Parts of one sequence that are asked for together."""


class FetchFailed(Exception):
    """What came is not to be used; the message says why. It is computed."""


class Away(FetchFailed):
    """Nothing came, or not in time. Others need not wait for the same."""


Fetch = Callable[[KVPart, float], CheckedKV | None]
"""A part by a deadline in time.monotonic(), verified; None: not there. Raises FetchFailed."""


class Observe(Protocol):
    """What a tier tells of each restore: for metrics."""

    def __call__(self, tier: str, *, num_bytes: int, seconds: float, failed: bool) -> None: ...


@dataclass(slots=True)
class _Fetched:
    held: int
    """Tokens of the sequence."""
    bytes: int = 0
    failure: Exception | None = None


class Fetcher:
    """Of one tier. Thread-safe."""

    def __init__(self, tier: str, layout: KVLayout, worth: Worth, threads: Executor, observe: Observe) -> None:
        self._tier = tier
        self._layout = layout
        self._most = part_blocks(layout)
        self._worth = worth
        self._threads = threads
        self._observe = observe
        self._lock = threading.Lock()
        self._away_until: dict[str, float] = {}

    @property
    def kind(self) -> str:
        """Of the layout."""
        return self._layout.kind

    def restore(self, wanted: Wanted, fetch: Fetch, where: str) -> int:
        """Tokens of the sequence that are held then. Raises Gone."""
        missing = len(wanted.chain) * BLOCK_TOKENS - wanted.held
        patience = self._worth.patience(missing)
        if patience is None or self._is_away(where):
            return wanted.held
        began = time.monotonic()
        if wanted.until - began < LEAST_SECONDS:
            return wanted.held
        deadline = min(began + patience, wanted.until)
        fetched = self._fetched(wanted, fetch, deadline)
        seconds, tokens = time.monotonic() - began, fetched.held - wanted.held
        in_haste = deadline < began + patience and time.monotonic() >= deadline
        if not in_haste:  # A client's own short deadline says nothing of the tier.
            self._worth.fetched(tokens, seconds)
            if isinstance(fetched.failure, Away):
                self._left_alone(where)
        if fetched.failure is not None:
            _log.warning("%d of %d tokens came from %s, the rest is computed: %s", tokens, missing, where, fetched.failure)
        self._observe(self._tier, num_bytes=fetched.bytes, seconds=seconds, failed=fetched.failure is not None)
        return fetched.held

    def checked(self, data: bytes | bytearray | memoryview, first: int, end: int) -> CheckedKV:
        """Raises AlteredKV or ForeignKV, also where it is not of tokens [first, end)."""
        found = checked(self._layout, data)
        if (found.first, found.end) != (first, end):
            raise ForeignKV(f"tokens {found.first} to {found.end} in place of {first} to {end}")
        return found

    def _is_away(self, where: str) -> bool:
        with self._lock:
            return time.monotonic() < self._away_until.get(where, -math.inf)

    def _left_alone(self, where: str) -> None:
        now = time.monotonic()
        with self._lock:
            self._away_until = {known: until for known, until in self._away_until.items() if until > now}
            self._away_until[where] = now + _LEFT_ALONE_SECONDS

    def _fetched(self, wanted: Wanted, fetch: Fetch, deadline: float) -> _Fetched:
        """What has come by the deadline is kept."""
        parts = deque(parts_between(wanted.held // BLOCK_TOKENS, len(wanted.chain), self._most))
        asked: dict[KVPart, Future[CheckedKV | None]] = {}
        fetched = _Fetched(wanted.held)
        try:
            while parts:
                for part in islice(parts, _AT_ONCE):
                    if part not in asked:
                        asked[part] = self._threads.submit(fetch, part, deadline)
                part = parts.popleft()
                found = _result(asked.pop(part), deadline)
                if found is None:
                    parts = deque(half for half in part.halves() if half.end * BLOCK_TOKENS > fetched.held)
                else:
                    fetched.held = _put(wanted, found)
                    fetched.bytes += len(found.payload)
        except (FetchFailed, AlteredKV, ForeignKV, ValueError) as error:
            fetched.failure = error
        finally:
            for future in asked.values():
                future.cancel()
        return fetched


def part_blocks(layout: KVLayout) -> int:
    """Of all parts of conversations of this layout, at peers and in the store."""
    return most_blocks(layout.token_bytes * BLOCK_TOKENS)


def _put(wanted: Wanted, found: CheckedKV) -> int:
    return wanted.at(lambda pool, handle: put_kv(pool, handle, found))


def _result(future: "Future[CheckedKV | None]", deadline: float) -> CheckedKV | None:
    try:
        return future.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError as error:
        raise Away("it did not come in time") from error
