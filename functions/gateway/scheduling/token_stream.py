"""The tokens of one answer on their way from the scheduler to an API, how the answer ended, and how long it took.

The stream has a lock of its own, so the scheduler and the API do not wait for each other's locks. Either may end the stream.
Only the first end counts.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise

from eventing.problems import Problem
from eventing.wire.generation import FinishReason, ProgressEvent, TokenLogprob


@dataclass(frozen=True, slots=True)
class StreamTimings:
    """Times of one answer, in seconds from the request's arrival. A time is None if its event has not happened yet."""

    queue_seconds: float | None  # until the first chunk was sent, so routes and memory are included
    time_to_first_token_seconds: float | None
    total_seconds: float | None
    replays: int  # how often keys and values were computed again, for any cause


@dataclass(eq=False)
class TokenStream:
    """The tokens of one answer: the scheduler puts them in, an API takes them out. Thread-safe."""

    max_tokens: int  # the answer ends after so many
    eos_ids: Collection[int] = ()  # end-of-text tokens: each ends the answer
    on_cancel: Callable[[], None] = lambda: None  # called by `cancel`, without the stream's lock
    arrived: float | None = None  # when the request came in, in time.monotonic(); None: now
    kept_end_ids: Collection[int] = ()  # those of `eos_ids` that become part of `token_ids`
    # What the answer awaits; None: nothing but its next token. Called without the stream's lock.
    progress: Callable[[], ProgressEvent | None] = lambda: None

    def __post_init__(self) -> None:
        self.over = False  # no more tokens will come
        self.finish_reason: FinishReason | None = None  # None before the end, and after a failure
        self.problem: Problem | None = None  # what failed
        self.token_ids: list[int] = []  # so far, without an end-of-text token that is not kept
        self.completion_tokens = 0  # computed for the answer; an end-of-text token counts
        self.cached_tokens = 0  # prompt tokens that every stage held when the first chunk was sent
        self.draft_tokens_accepted = 0
        self.draft_tokens_rejected = 0
        # Called after each token and at the end. It must not block: the stream's lock is held.
        self.on_change: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._taken = 0  # tokens that the API has taken
        self.logprobs: list[TokenLogprob] = []  # of `token_ids`; empty if the prompt did not ask for log-probabilities
        self._prompt_logprobs: dict[int, TokenLogprob] = {}  # by position
        self.vector: list[float] = []  # of the prompt; complete when the stream is over and nothing failed
        self._pooled_tokens = 0  # of the prompt, from its first on, that are in `vector`
        self._put_at: list[float] = []  # when each token came, in time.monotonic()
        self._arrived = time.monotonic() if self.arrived is None else self.arrived
        self._started_at: float | None = None
        self._first_token_at: float | None = None
        self._ended_at: float | None = None
        self.replays = 0  # how often keys and values were computed again, for any cause

    # For the API.

    def next_token(self, timeout: float | None = None) -> int | None:
        """Waits for the next token and returns its id.

        Returns None if the answer is complete, or if no token came within `timeout` seconds. If `timeout` is None, waits for
        ever. If a Problem ended the answer, raises it after all tokens have been returned.
        """
        with self._changed:
            if self._taken == len(self.token_ids) and not self.over:
                self._changed.wait_for(lambda: self._taken < len(self.token_ids) or self.over, timeout)
            if self._taken < len(self.token_ids):
                self._taken += 1
                return self.token_ids[self._taken - 1]
            if self.problem is not None:
                raise copy(self.problem)  # a raised exception holds the stream and the request, by its traceback's frames
            return None

    def prompt_logprobs(self) -> list[TokenLogprob]:
        """Returns the log-probabilities of the prompt's tokens, from the second token on.

        The list is complete once the answer has begun or ended.
        """
        with self._changed:
            return [self._prompt_logprobs[position] for position in sorted(self._prompt_logprobs)]

    @property
    def ended(self) -> bool:
        """Whether the answer is over and the API has taken all its tokens."""
        with self._changed:
            return self.over and self._taken >= len(self.token_ids)

    def waits(self, begin: int) -> list[float]:
        """Returns the seconds before each token from index `begin` on. The first token's wait begins with the request.

        A token counts when it is drawn, not when the API takes it. An end-of-text token that is dropped counts only if it is
        the first token.
        """
        with self._changed:
            put_at = self._put_at or ([] if self._first_token_at is None else [self._first_token_at])
            before = self._arrived if begin == 0 else put_at[begin - 1]
            return [later - earlier for earlier, later in pairwise([before, *put_at[begin:]])]

    def cancel(self, reason: FinishReason = "cancelled") -> None:
        """Ends the answer for the client, and frees its memory at the stages at once. No tokens come after this."""
        self.finish(reason)
        self.on_cancel()

    def timings(self) -> StreamTimings:
        started, first, ended = (
            None if moment is None else moment - self._arrived
            for moment in (self._started_at, self._first_token_at, self._ended_at)
        )
        return StreamTimings(started, first, ended, self.replays)

    # For the scheduler.

    def started(self, cached_tokens: int) -> bool:
        """Records that a chunk is sent. Returns whether this is the sequence's first chunk.

        `cached_tokens` is the number of prompt tokens before the chunk, which every stage holds already.
        """
        if self._started_at is not None:
            return False
        self._started_at = time.monotonic()
        self.cached_tokens = cached_tokens
        return True

    def scored(self, position: int, logprobs: Iterable[TokenLogprob]) -> int:
        """Adds log-probabilities of prompt tokens from index `position` on. Returns how many prompt tokens have one now."""
        with self._changed:
            self._prompt_logprobs.update(enumerate(logprobs, position))
            return len(self._prompt_logprobs)

    def pooled(self, position: int, length: int, vector: Sequence[float]) -> int:
        """Adds the vector of `length` prompt tokens from index `position` on. Returns how many tokens the vector covers now.

        The vector of several chunks is the mean of theirs, weighted by their lengths. A chunk at position 0 replaces the whole
        vector, because the prompt is then computed again.
        """
        with self._changed:
            if position == 0:
                self.vector, self._pooled_tokens = list(vector), length
            elif position == self._pooled_tokens:
                total = position + length
                pairs = zip(self.vector, vector, strict=True)
                self.vector = [(before * position + own * length) / total for before, own in pairs]
                self._pooled_tokens = total
            return self._pooled_tokens

    def put(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Adds a token that the last stage drew. Does nothing if the answer has ended.

        An end-of-text token ends the answer, and so does the token that makes `max_tokens`.
        """
        with self._changed:
            if self.over:
                return
            self.completion_tokens += 1
            now = time.monotonic()
            if self._first_token_at is None:
                self._first_token_at = now
            is_end = token in self.eos_ids
            if not is_end or token in self.kept_end_ids:
                if logprob is not None:
                    self.logprobs.append(logprob)
                self.token_ids.append(token)
                self._put_at.append(now)
            if is_end:
                self._end("stop")
            elif self.completion_tokens >= self.max_tokens:
                self._end("length")
            else:
                self._changed.notify_all()
                self.on_change()

    def finish(self, reason: FinishReason) -> None:
        """Ends the answer for `reason`. Does nothing if it has ended."""
        with self._changed:
            if not self.over:
                self._end(reason)

    def fail(self, problem: Problem) -> None:
        """Ends the answer with an error, which `next_token` raises. Does nothing if it has ended."""
        with self._changed:
            if not self.over:
                self.problem = problem
                self._end(None)

    def _end(self, reason: FinishReason | None) -> None:
        """Ends the stream. The caller holds the stream's lock. If `reason` is None, the answer failed."""
        self.finish_reason = reason
        self._ended_at = time.monotonic()
        self.over = True
        self._changed.notify_all()
        self.on_change()
