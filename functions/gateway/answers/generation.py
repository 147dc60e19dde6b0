"""What is answered to one request: one answer, or several that come together. Knows no HTTP."""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Final

from msgspec.structs import replace

from eventing.wire.generation import (
    CompletionTokensDetails,
    GenerateResponse,
    PromptTokensDetails,
    Timings,
    TokenEvent,
    Usage,
)
from functions.gateway.answers.answer import Answer
from functions.gateway.answers.metrics import GatewayMetrics

HEARTBEAT_SECONDS: Final = 3.0
"""How often a stream says that it lives."""
LOOK_SECONDS: Final = 0.5
"""How often it is looked whether the client is there still."""


class ClientLeft(Exception):
    """Nobody awaits the answer any more; it has been cancelled."""


class Generation:
    """Iterate `tokens` to its end, then ask for `response`; or `close` it where nobody listens any more."""

    def __init__(
        self, request_id: str, answers: Sequence[Answer], to_each: int, gone: Callable[[], bool], metrics: GatewayMetrics
    ) -> None:
        """answers: of each prompt so many as `to_each` says. gone: whether the client has left; waits for nothing."""
        self.request_id = request_id
        self.answers = answers
        self._to_each = to_each
        self._gone = gone
        self._metrics = metrics
        self._noticed = threading.Event()
        if len(answers) > 1:
            for answer in answers:
                answer.token_stream.notify(self._noticed.set)

    def tokens(self, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> Iterator[TokenEvent | None]:
        """Tokens of all answers, each with the text that it completed; None when so many seconds brought nothing.

        Raises the Problem that ended an answer before its time, or ClientLeft. When the iterator is closed, what has not ended
        is cancelled.
        """
        now = time.monotonic()
        speaks_at, looks_at = now + heartbeat_seconds, now + LOOK_SECONDS
        said = True
        try:
            while not all(answer.done for answer in self.answers):
                said = yield from self._take(0.0 if said else max(0.0, min(speaks_at, looks_at) - now))
                now = time.monotonic()
                if now >= looks_at:
                    looks_at = now + LOOK_SECONDS
                    if self._gone():
                        raise ClientLeft
                if not said:
                    if now < speaks_at:
                        continue
                    yield None
                    now = time.monotonic()
                speaks_at = now + heartbeat_seconds
        finally:
            self.close()

    def _take(self, seconds: float) -> Generator[TokenEvent, None, bool]:
        """Returns whether there was something within `seconds`."""
        going = [(number, answer) for number, answer in enumerate(self.answers) if not answer.done]
        if len(going) > 1:
            self._noticed.wait(seconds)
            self._noticed.clear()
            seconds = 0.0
        said = False
        for number, answer in going:
            for event in answer.take(seconds):
                said = True
                yield event if number == 0 else replace(event, choice=number)
            said = said or answer.done
        return said

    def close(self) -> None:
        for answer in self.answers:
            answer.close()

    def usage(self) -> Usage:
        """So far. A prompt counts once, however many answers there are to it."""
        prompt_tokens = sum(answer.prompt_tokens for answer in self.answers[:: self._to_each])
        completion_tokens = sum(answer.completion_tokens for answer in self.answers)
        draft_tokens = [answer.draft_tokens for answer in self.answers]
        details = CompletionTokensDetails(
            sum(one.accepted_prediction_tokens for one in draft_tokens),
            sum(one.rejected_prediction_tokens for one in draft_tokens),
        )
        cached = sum(answer.token_stream.cached_tokens for answer in self.answers[:: self._to_each])
        total = prompt_tokens + completion_tokens
        return Usage(prompt_tokens, completion_tokens, total, details, PromptTokensDetails(cached))

    def response(self) -> GenerateResponse:
        """After the last token."""
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
        """What was given out so far."""
        return "\n".join(answer.text for answer in self.answers)

    def account(self) -> dict[str, object]:
        """For the access log, once it is closed: how it ended, what it took."""
        timings, usage = self._timings(), self.usage()
        return {
            "outcome": self._outcome(),
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "first_token_seconds": round(timings.time_to_first_token_seconds, 4) if usage.completion_tokens else None,
            "replays": timings.replays,
        }

    def _outcome(self) -> str:
        """Of the answer that broke, if one did; the others were cancelled then."""
        broken = (answer for answer in self.answers if answer.token_stream.problem is not None)
        return next(broken, self.answers[0]).outcome

    def _timings(self) -> Timings:
        each = [answer.timings() for answer in self.answers]
        return Timings(
            queue_seconds=min(one.queue_seconds for one in each),
            time_to_first_token_seconds=min(one.time_to_first_token_seconds for one in each),
            total_seconds=max(one.total_seconds for one in each),
            tokens_per_second=sum(one.tokens_per_second for one in each),
            replays=sum(one.replays for one in each),
        )
