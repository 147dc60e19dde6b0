"""From the scheduler to a door: the tokens of one answer as they come, how it ended, what it took.

The scheduler puts, the door takes; neither waits for the other. The lock is the stream's own, so that a door needs none of the
scheduler's. Whoever ends the stream first says how it ended.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise

from eventing.problems import Problem
from eventing.wire.generation import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class Timings:
    """What an answer took so far, seconds since its request came in. None: not yet."""

    queue_seconds: float | None
    """Until its first chunk was sent, memory and routes included."""
    time_to_first_token_seconds: float | None
    total_seconds: float | None
    replays: int
    """How often its keys and values were computed anew, whatever the cause."""


class TokenStream:
    """Thread-safe."""

    def __init__(
        self,
        max_tokens: int,
        eos_ids: Collection[int] = (),
        on_cancel: Callable[[], None] = lambda: None,
        arrived: float | None = None,
        kept_end_ids: Collection[int] = (),
    ) -> None:
        """on_cancel: called, with no lock held, when nobody awaits the answer any more. arrived, kept_end_ids: as a Prompt has
        them."""
        self._max_tokens = max_tokens
        self._eos_ids = eos_ids
        self._kept_end_ids = kept_end_ids
        self._noticed: Callable[[], None] = lambda: None
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: dict[int, TokenLogprob] = {}
        """By position."""
        self._on_cancel = on_cancel
        self._changed = threading.Condition()
        self._token_ids: list[int] = []
        self._put_at: list[float] = []
        """When each of them came, in time.monotonic()."""
        self._taken = 0
        self._computed = 0
        self.over = False
        """No further token will come."""
        self._finish_reason: FinishReason | None = None
        self._problem: Problem | None = None
        self._began = time.monotonic() if arrived is None else arrived
        self._started_at: float | None = None
        self._first_token_at: float | None = None
        self._ended_at: float | None = None
        self._replays = 0
        self.cached_tokens = 0
        """Of the prompt, that were held already."""
        self.draft_tokens_accepted = 0
        self.draft_tokens_rejected = 0

    # For the door.

    def next_token(self, timeout: float | None = None) -> int | None:
        """The next token id in order; None when `timeout` seconds brought none or the answer is complete.

        A token that ends the answer is not handed out, unless it is kept. Raises the Problem that ended the answer, after all
        tokens before it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._taken < len(self._token_ids) or self.over, timeout)
            if self._taken < len(self._token_ids):
                self._taken += 1
                return self._token_ids[self._taken - 1]
            if self._problem is not None:
                raise self._problem
            return None

    def notify(self, noticed: Callable[[], None]) -> None:
        """Calls `noticed` whenever there is something to take, or to be seen, from now on. It waits for nothing."""
        with self._changed:
            self._noticed = noticed

    def logprob(self, index: int) -> TokenLogprob | None:
        """Of token `index` of the answer; None where none was wanted."""
        return self._logprobs[index] if index < len(self._logprobs) else None

    def prompt_logprobs(self) -> list[TokenLogprob]:
        """Of the prompt's tokens from the second one on, once the answer has begun or ended."""
        with self._changed:
            return [self._prompt_logprobs[position] for position in sorted(self._prompt_logprobs)]

    @property
    def ended(self) -> bool:
        """The answer is complete, or failed, and every token of it has been taken."""
        with self._changed:
            return self.over and self._taken >= len(self._token_ids)

    @property
    def token_ids(self) -> list[int]:
        """What came so far, without the end-of-text token."""
        return list(self._token_ids)

    @property
    def completion_tokens(self) -> int:
        """Tokens that the pipeline computed for the answer, an end-of-text token counted."""
        return self._computed

    def waits(self, begin: int) -> list[float]:
        """Seconds from the request to its first token, then from each token to the next, as the pipeline drew them; those
        from number `begin` on. Also of tokens that nobody has taken; of an end-of-text token where it is the first."""
        with self._changed:
            came = self._put_at or ([] if self._first_token_at is None else [self._first_token_at])
            before = self._began if begin == 0 else came[begin - 1]
            return [later - earlier for earlier, later in pairwise([before, *came[begin:]])]

    def cancel(self, reason: FinishReason = "cancelled") -> None:
        """Nothing more is wanted of the answer: its memory is freed at once. Without effect on one that has ended."""
        self.finish(reason)
        self._on_cancel()

    def timings(self) -> Timings:
        def since(moment: float | None) -> float | None:
            return None if moment is None else moment - self._began

        return Timings(since(self._started_at), since(self._first_token_at), since(self._ended_at), self._replays)

    # For both.

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while tokens may still come, and after a failure. Tokens not yet taken remain to be taken."""
        return self._finish_reason

    @property
    def problem(self) -> Problem | None:
        return self._problem

    # For the scheduler.

    def started(self, cached_tokens: int) -> bool:
        """A chunk of the prompt is on its way, behind so many tokens that need none; whether it is the first."""
        if self._started_at is not None:
            return False
        self._started_at = time.monotonic()
        self.cached_tokens = cached_tokens
        return True

    def replayed(self) -> None:
        self._replays += 1

    def drafted(self, agreed: int, missed: int) -> None:
        """What became of draft tokens of its tokens."""
        self.draft_tokens_accepted += agreed
        self.draft_tokens_rejected += missed

    def scored(self, position: int, logprobs: Iterable[TokenLogprob]) -> int:
        """Of the prompt's tokens from `position` on; how many there are now."""
        with self._changed:
            self._prompt_logprobs.update(enumerate(logprobs, position))
            return len(self._prompt_logprobs)

    def put(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """The last stage drew `token`, which ends the answer if it is an end-of-text token or the last one allowed."""
        with self._changed:
            if self.over:
                return
            self._computed += 1
            now = time.monotonic()
            if self._first_token_at is None:
                self._first_token_at = now
            if token in self._eos_ids and token not in self._kept_end_ids:
                self._end("stop")
                return
            if logprob is not None:
                self._logprobs.append(logprob)
            self._token_ids.append(token)
            self._put_at.append(now)
            if token in self._eos_ids:
                self._end("stop")
            elif self._computed >= self._max_tokens:
                self._end("length")
            self._tell()

    def finish(self, reason: FinishReason) -> None:
        with self._changed:
            if not self.over:
                self._end(reason)

    def fail(self, problem: Problem) -> None:
        with self._changed:
            if not self.over:
                self._problem = problem
                self._end(None)

    def _end(self, reason: FinishReason | None) -> None:
        self._finish_reason = reason
        self._ended_at = time.monotonic()
        self.over = True
        self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        self._noticed()
