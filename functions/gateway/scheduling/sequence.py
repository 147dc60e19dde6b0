"""One answer in the making, as the door sees it: tokens as they come, how it ended, what it took.

The scheduler puts, the door takes; neither waits for the other. Where a sequence's keys and values lie is `progress`.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from eventing.problems import Problem
from eventing.wire.events import Sampling
from eventing.wire.generation import FinishReason
from functions.observing.tracing import TraceContext


@dataclass(frozen=True, slots=True)
class Timings:
    """What an answer took so far, seconds since it was handed in. None: not yet."""

    queue_seconds: float | None
    """Until its first chunk was sent, memory and routes included."""
    time_to_first_token_seconds: float | None
    total_seconds: float | None
    replays: int
    """How often its keys and values were computed anew, whatever the cause."""


class Sequence:
    """A prompt and what is generated behind it. The methods for the door may be called from any thread."""

    def __init__(
        self,
        id: str,
        prompt_token_ids: Tokens[int],
        max_tokens: int,
        *,
        sampling: Sampling | None = None,
        eos_ids: Collection[int] = (),
        client_id: str = "",
        deadline_seconds: float = 600.0,
        trace: TraceContext | None = None,
    ) -> None:
        """`id` is for logs and errors; the ids that stages see are the scheduler's own.

        Raises ValueError for an empty prompt or fewer than one token to generate.
        """
        if not prompt_token_ids or max_tokens < 1:
            raise ValueError(f"{len(prompt_token_ids)} prompt tokens and max_tokens {max_tokens}: both must be at least 1")
        self.id = id
        self.prompt_tokens = len(prompt_token_ids)
        self.max_tokens = max_tokens
        self.sampling = sampling or Sampling()
        self.eos_ids = frozenset(eos_ids)
        self.client_id = client_id
        self.deadline_seconds = deadline_seconds
        self.deadline = time.monotonic() + deadline_seconds
        self.trace = trace
        """Of the answer's span."""
        self.tokens = list(prompt_token_ids)
        """Prompt and all that was generated, an end-of-text token included. The scheduler's; grows only."""
        self._changed = threading.Condition()
        self._taken = self.prompt_tokens
        self._visible = self.prompt_tokens
        self._finish_reason: FinishReason | None = None
        self._problem: Problem | None = None
        self._cancel: Callable[[], None] | None = None
        self._submitted = time.monotonic()
        self._started_at: float | None = None
        self._first_token_at: float | None = None
        self._ended_at: float | None = None
        self._replays = 0

    # For the door.

    def next_token(self, timeout: float | None = None) -> int | None:
        """The next token id in order; None when `timeout` seconds brought none or the answer is complete.

        An end-of-text token is not handed out. Raises the Problem that ended the sequence, after all tokens before it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._taken < self._visible or self.over, timeout)
            if self._taken < self._visible:
                self._taken += 1
                return self.tokens[self._taken - 1]
            if self._problem is not None:
                raise self._problem
            return None

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while tokens may still come, and after a failure. Tokens not yet taken remain to be taken."""
        return self._finish_reason

    @property
    def problem(self) -> Problem | None:
        return self._problem

    @property
    def ended(self) -> bool:
        """The answer is complete, or failed, and every token of it has been taken."""
        with self._changed:
            return self.over and self._taken >= self._visible

    @property
    def token_ids(self) -> list[int]:
        """What was generated so far, without the end-of-text token."""
        return self.tokens[self.prompt_tokens : self._visible]

    @property
    def completion_tokens(self) -> int:
        """Tokens that the pipeline computed for the answer, an end-of-text token counted."""
        return len(self.tokens) - self.prompt_tokens

    def cancel(self) -> None:
        """Nobody awaits the answer any more: its memory is freed at once. Without effect on one that has ended."""
        self.finish("cancelled")
        if self._cancel is not None:
            self._cancel()

    def timings(self) -> Timings:
        def since(moment: float | None) -> float | None:
            return None if moment is None else moment - self._submitted

        return Timings(since(self._started_at), since(self._first_token_at), since(self._ended_at), self._replays)

    # For the scheduler.

    @property
    def over(self) -> bool:
        """No further token will be added."""
        return self._finish_reason is not None or self._problem is not None

    def attach(self, cancel: Callable[[], None]) -> None:
        """From here on `cancel` is called when nobody awaits the answer."""
        self._cancel = cancel

    def started(self) -> None:
        """Its first chunk is on its way."""
        if self._started_at is None:
            self._started_at = time.monotonic()

    def replayed(self) -> None:
        self._replays += 1

    def put(self, token: int) -> None:
        """Appends a token that the last stage drew; ends the sequence with an end-of-text token or the last one allowed."""
        with self._changed:
            if self.over:
                return
            self.tokens.append(token)
            self._first_token_at = self._first_token_at or time.monotonic()
            if token in self.eos_ids:
                self._end("stop")
                return
            self._visible += 1
            if self.completion_tokens >= self.max_tokens:
                self._end("length")
            self._changed.notify_all()

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
        self._changed.notify_all()


def traces_of(sequences: Iterable[Sequence]) -> list[TraceContext]:
    return [sequence.trace for sequence in sequences if sequence.trace is not None]
