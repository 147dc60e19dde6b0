"""What both doors do: a request becomes a prompt for the scheduler, the tokens that come become an answer. Knows no HTTP."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

from eventing.problems import InvalidRequest, Problem
from eventing.wire.generation import (
    CompletionTokensDetails,
    FinishReason,
    GenerateRequest,
    GenerateResponse,
    Timings,
    TokenEvent,
    Usage,
)
from functions.gateway.doors.client_limits import Allowance, ClientLimits, Leave
from functions.gateway.doors.metrics import GatewayMetrics
from functions.gateway.scheduling.prompt import Prompt
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.text.text_stream import TextStream
from functions.gateway.text.tokenizer import ModelText
from functions.observing.tracing import PASSING, Attributes, Span, TraceContext, Tracer

HEARTBEAT_SECONDS: Final = 3.0
"""How often a stream says that it lives."""
LOOK_SECONDS: Final = 0.5
"""How often it is looked whether the client is there still."""


class ClientLeft(Exception):
    """Nobody awaits the answer any more; it has been cancelled."""


class Submitter(Protocol):
    """A Scheduler."""

    def entering(self) -> AbstractContextManager[None]:
        """For what is done to a request before `submit`: it counts as one that waits. Raises QueueFull, NotReady."""

    def submit(self, prompt: Prompt) -> TokenStream:
        """Tokens come by themselves. Raises QueueFull, NotReady, InvalidRequest."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, since when and until when."""

    request_id: str
    client_id: str
    """Clients share the pipeline fairly, whatever each of them asks for."""
    seed: int
    """For a request that names none."""
    deadline_seconds: float
    """From `arrived` on."""
    arrived: float
    """When the request came in, in time.monotonic()."""
    gone: Callable[[], bool] = lambda: False
    """Whether the client has left. Waits for nothing."""
    trace: TraceContext | None = None
    """Of the client's span, where it sent one."""


class Answers:
    """Answers requests. Thread-safe."""

    def __init__(
        self,
        text: ModelText,
        scheduler: Submitter,
        metrics: GatewayMetrics,
        tracer: Tracer = PASSING,
        limits: ClientLimits | None = None,
    ) -> None:
        self.text = text
        self._limits = limits or ClientLimits(Allowance())
        self._scheduler = scheduler
        self._metrics = metrics
        self._tracer = tracer

    def begin(self, request: GenerateRequest, asker: Asker) -> "Answer":
        """Begins an answer. Raises InvalidRequest, QueueFull, RateLimited, NotReady."""
        leave = self._limits.enter(asker.client_id)
        try:
            return self._begun(request, asker, leave)
        except BaseException:
            leave(0)
            raise

    def _begun(self, request: GenerateRequest, asker: Asker, leave: Leave) -> "Answer":
        token_ids, predicted_ids = self._token_ids(request)
        room = self.text.context_length - len(token_ids)
        if not token_ids:
            raise InvalidRequest("the prompt has no tokens")
        if room < 1:
            raise InvalidRequest(
                f"the prompt has {len(token_ids)} tokens and the model's context is {self.text.context_length}, which must "
                "hold the answer too; shorten the prompt"
            )
        span = self._tracer.serve(
            "generate", asker.trace, {"lamina.request": asker.request_id, "lamina.prompt_tokens": len(token_ids)}
        )
        prompt = Prompt(
            token_ids,
            min(request.max_tokens, room),
            sampling=request.sampling(asker.seed, len(token_ids), self.text.eos_ids),
            predicted_ids=predicted_ids,
            eos_ids=frozenset() if request.ignore_eos else self.text.eos_ids,
            client_id=asker.client_id,
            deadline_seconds=asker.deadline_seconds,
            arrived=asker.arrived,
            trace=span.context,
            request_id=asker.request_id,
        )
        try:
            token_stream = self._scheduler.submit(prompt)
        except Problem as problem:
            span.end(problem.name)
            raise
        self._metrics.prompt_tokens.inc(len(token_ids))
        # A message is a text of its own; what continues a prompt is read behind it.
        before = () if request.messages is not None else token_ids
        text_stream = TextStream(self.text.tokenizer, request.stop_strings, before)
        return Answer(asker, len(token_ids), token_stream, text_stream, self._metrics, span, leave)

    def _token_ids(self, request: GenerateRequest) -> tuple[list[int], list[int]]:
        """Of the prompt, and of the answer that is expected. Nothing is rendered or tokenized that is too long to fit, or that
        would be refused afterwards."""
        if request.messages is not None:
            self.text.check_messages(request.messages)
        else:
            self.text.check(request.prompt or "")
        self.text.check(request.prediction)
        with self._scheduler.entering():
            predicted = self.text.encode_expected(request.prediction) if request.prediction else []
            if request.messages is not None:
                return self.text.encode_messages(request.messages), predicted
            return self.text.encode(request.prompt or ""), predicted


class Answer:
    """One answer. Iterate `tokens` to its end, then ask for `response`; or `close` it where nobody listens any more."""

    def __init__(
        self,
        asker: Asker,
        prompt_tokens: int,
        token_stream: TokenStream,
        text_stream: TextStream,
        metrics: GatewayMetrics,
        span: Span,
        leave: Leave,
    ) -> None:
        self.request_id = asker.request_id
        self._gone = asker.gone
        self._prompt_tokens = prompt_tokens
        self._token_stream = token_stream
        self._text_stream = text_stream
        self._metrics = metrics
        self._span = span
        self._leave = leave
        self._token_ids: list[int] = []
        self._given = 0
        """Tokens given out; the others wait until their text is certain."""
        self._text: list[str] = []
        self._certain = ""
        """Text that is certain and not given out, because the token that completed it waits."""
        self._measured = 0
        """Tokens whose time has been observed."""
        self._closed = False

    def tokens(self, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> Iterator[TokenEvent | None]:
        """The answer's tokens, each with the text that it completed; None when so many seconds brought nothing.

        A token is given out once its text is certain, so all texts together are the answer's. Raises the Problem that
        ended the answer before its time, or ClientLeft. When the iterator is closed, the answer is cancelled.
        """
        now = time.monotonic()
        speaks_at, looks_at = now + heartbeat_seconds, now + LOOK_SECONDS
        try:
            while not self._text_stream.stopped:
                token_id = self._token_stream.next_token(max(0.0, min(speaks_at, looks_at) - now))
                now = time.monotonic()
                if now >= looks_at:
                    looks_at = now + LOOK_SECONDS
                    if self._gone():
                        raise ClientLeft
                if token_id is not None:
                    self._take(token_id)
                    yield from self._give(len(self._token_ids) - self._text_stream.holds)
                elif self._token_stream.ended:
                    break
                elif now >= speaks_at:
                    yield None
                else:
                    continue
                now = time.monotonic()
                speaks_at = now + heartbeat_seconds
            self._certain += self._text_stream.finish()
            yield from self._give(len(self._token_ids))
        finally:
            self.close()

    def close(self) -> None:
        """Frees what the answer holds, if it has not ended by itself, and counts how it ended."""
        if self._closed:
            return
        self._closed = True
        if not self._token_stream.ended:
            self._token_stream.cancel("stop" if self._text_stream.stopped else "cancelled")
        self._leave(self._prompt_tokens + self._token_stream.completion_tokens)
        self._measure()
        self._metrics.answers.labels(self._outcome()).inc()
        problem = self._token_stream.problem
        told: Attributes = {"lamina.finish_reason": self._outcome(), "lamina.completion_tokens": self._completion_tokens()}
        self._span.end(None if problem is None else problem.name, told)

    def response(self) -> GenerateResponse:
        """After the last token."""
        prompt_tokens, completion_tokens = self._prompt_tokens, self._completion_tokens()
        timings = self._timings(completion_tokens)
        self._metrics.answer.observe(timings.total_seconds)
        return GenerateResponse(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=self._finish_reason(),
            usage=Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, self._guesses()),
            timings=timings,
        )

    @property
    def text(self) -> str:
        """What was given out so far."""
        return "".join(self._text)

    def account(self) -> dict[str, object]:
        """For the access log, once it is closed: how it ended, what it took."""
        timings = self._timings(completion_tokens := self._completion_tokens())
        return {
            "outcome": self._outcome(),
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "first_token_seconds": round(timings.time_to_first_token_seconds, 4) if completion_tokens else None,
            "replays": timings.replays,
        }

    def _take(self, token_id: int) -> None:
        self._measure()
        self._metrics.tokens.inc()
        self._token_ids.append(token_id)
        self._certain += self._text_stream.push(token_id)

    def _measure(self) -> None:
        """When the pipeline drew its tokens, whatever became of the answer, and however slowly it is read."""
        for seconds in self._token_stream.waits(self._measured):
            (self._metrics.inter_token if self._measured else self._metrics.first_token).observe(seconds)
            self._measured += 1

    def _give(self, end: int) -> Iterator[TokenEvent]:
        """Tokens up to `end`; the last of them carries all the text that is certain."""
        for index in range(self._given, end):
            text = self._certain if index == end - 1 else ""
            if text:
                self._text.append(text)
                self._certain = ""
            self._given = index + 1
            yield TokenEvent(index, self._token_ids[index], text)

    def _finish_reason(self) -> FinishReason:
        return "stop" if self._text_stream.stopped else self._token_stream.finish_reason or "cancelled"

    def _outcome(self) -> str:
        problem = self._token_stream.problem
        return self._finish_reason() if problem is None else problem.name

    def _completion_tokens(self) -> int:
        """Behind a stop string more may have been computed, which is no part of the answer."""
        return len(self._token_ids) if self._text_stream.stopped else self._token_stream.completion_tokens

    def _guesses(self) -> CompletionTokensDetails:
        return CompletionTokensDetails(self._token_stream.guesses_agreed, self._token_stream.guesses_missed)

    def _timings(self, completion_tokens: int) -> Timings:
        seen = self._token_stream.timings()
        total = seen.total_seconds or 0.0
        first = total if seen.time_to_first_token_seconds is None else seen.time_to_first_token_seconds
        decoding = total - first
        rate = (completion_tokens - 1) / decoding if completion_tokens > 1 and decoding > 0 else 0.0
        return Timings(seen.queue_seconds or 0.0, first, total, rate, seen.replays)
