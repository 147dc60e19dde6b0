"""The answers to one request: one, or several that are generated together. Knows no HTTP."""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from eventing.wire.generation import (
    CompletionTokensDetails,
    GenerateRequest,
    GenerateResponse,
    ProgressEvent,
    PromptTokensDetails,
    Timings,
    TokenEvent,
    Usage,
)
from functions.gateway.answers.answer import Answer
from functions.gateway.answers.metrics import GatewayMetrics

LOOK_SECONDS: Final = 0.5  # between checks whether the client is still connected, and what it waits for


class ClientLeft(Exception):
    """The client has disconnected, so the answer was cancelled."""


class Looks:
    """Checks every LOOK_SECONDS whether the client has left and, while no tokens come, what the answer waits for.

    `gone` returns, without waiting, whether the client has left. `awaited` returns what the answer waits for. If `awaited` is
    None, this is not checked.
    """

    def __init__(self, gone: Callable[[], bool], awaited: Callable[[], ProgressEvent | None] | None = None) -> None:
        self._gone = gone
        self._awaited = awaited
        self._told: ProgressEvent | None = None
        self._next_at = time.monotonic() + LOOK_SECONDS
        self._found = False  # a token came since the last look

    def seconds_to_wait(self) -> float:
        return max(0.0, self._next_at - time.monotonic())

    def look(self, found: bool) -> Iterator[ProgressEvent | None]:
        """Yields what the answer waits for, once, if no token has come for LOOK_SECONDS. Otherwise yields nothing.

        The item is None if nothing has changed. Call it after each wait for tokens. `found` says whether the wait brought
        tokens. Raises ClientLeft.
        """
        self._found = self._found or found
        if time.monotonic() < self._next_at:
            return
        if self._gone():
            raise ClientLeft
        if not self._found:
            before, self._told = self._told, None if self._awaited is None else self._awaited()
            yield None if self._told == before else self._told
        self._found = False
        self._next_at = time.monotonic() + LOOK_SECONDS


@dataclass(eq=False)
class Generation:
    """The answers to one request while they are generated. Use it from one thread at a time.

    Iterate `tokens` to its end, then call `response`. To cancel, call `close`.
    """

    request_id: str
    request: GenerateRequest
    answers: Sequence[Answer]  # those to the first prompt come first
    _gone: Callable[[], bool]  # see Looks
    _metrics: GatewayMetrics
    _noticed: threading.Event = field(default_factory=threading.Event)  # set when one of several answers has a token or ends

    def __post_init__(self) -> None:
        for answer in self.answers if len(self.answers) > 1 else ():
            answer.token_stream.on_change = self._noticed.set

    def tokens(self) -> Iterator[TokenEvent | ProgressEvent | None]:
        """Yields the tokens of all answers as they come.

        While no tokens come, yields every LOOK_SECONDS what the answers wait for, or None. Raises the Problem that ended an
        answer early, or ClientLeft. Closing the iterator cancels unfinished answers.
        """
        looks = Looks(self._gone, self._await_what if self.request.include_progress else None)
        found = True
        try:
            while not all(answer.done for answer in self.answers):
                found = yield from self._take(0.0 if found else looks.seconds_to_wait())
                yield from looks.look(found)
        finally:
            self.close()

    def _await_what(self) -> ProgressEvent | None:
        """Returns what the answers wait for besides their next tokens, such as a cold start. None if there is nothing else."""
        running = (answer.token_stream.progress() for answer in self.answers if not answer.done)
        return next((progress for progress in running if progress is not None), None)

    def _take(self, seconds: float) -> Generator[TokenEvent, None, bool]:
        """Yields tokens after waiting for them up to `seconds`. Returns whether a token came or an answer ended."""
        running = [(number, answer) for number, answer in enumerate(self.answers) if not answer.done]
        if len(running) > 1:
            self._noticed.wait(seconds)
            self._noticed.clear()
            seconds = 0.0
        found = False
        for number, answer in running:
            for event in answer.take(seconds):
                found = True
                yield event if number == 0 else replace(event, choice=number)
            found = found or answer.done
        return found

    def close(self) -> None:
        for answer in self.answers:
            answer.close()

    def usage(self) -> Usage:
        """Returns the numbers of tokens so far. A prompt counts once, however many answers it has."""
        one_per_prompt = self.answers[:: self.request.n]
        prompt_tokens = sum(len(answer.prompt_ids) for answer in one_per_prompt)
        completion_tokens = sum(answer.completion_tokens for answer in self.answers)
        streams = [answer.token_stream for answer in self.answers]
        drafts = CompletionTokensDetails(
            sum(stream.draft_tokens_accepted for stream in streams), sum(stream.draft_tokens_rejected for stream in streams)
        )
        cached = PromptTokensDetails(sum(answer.token_stream.cached_tokens for answer in one_per_prompt))
        return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, drafts, cached)

    def response(self) -> GenerateResponse:
        """Returns all answers, complete. Call it once, after the last token: it also records the duration in the metrics."""
        timings = self._timings()
        self._metrics.answer.observe(timings.total_seconds)
        choices = tuple(answer.choice() for answer in self.answers)
        first = choices[0]
        return GenerateResponse(
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            usage=self.usage(),
            timings=timings,
            logprobs=first.logprobs,
            choices=choices if len(choices) > 1 else (),
        )

    @property
    def text(self) -> str:
        """The text of all answers so far, with a newline between two answers."""
        return "\n".join(answer.text for answer in self.answers)

    def account(self) -> dict[str, object]:
        """Returns the request's fields of the access log: outcome, numbers of tokens, and times. Call it after `close`."""
        timings, usage = self._timings(), self.usage()
        # If one answer broke, the others were cancelled.
        broken = (answer for answer in self.answers if answer.token_stream.problem is not None)
        return {
            "outcome": next(broken, self.answers[0]).outcome,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "first_token_seconds": round(timings.time_to_first_token_seconds, 4) if usage.completion_tokens else None,
            "replays": timings.replays,
        }

    def _timings(self) -> Timings:
        each = [answer.timings() for answer in self.answers]
        return Timings(
            queue_seconds=min(one.queue_seconds for one in each),
            time_to_first_token_seconds=min(one.time_to_first_token_seconds for one in each),
            total_seconds=max(one.total_seconds for one in each),
            tokens_per_second=sum(one.tokens_per_second for one in each),
            replays=sum(one.replays for one in each),
        )
