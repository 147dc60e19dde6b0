"""One answer as it comes: tokens and the text that they complete, how it ended, what it took. Knows no HTTP."""

from collections.abc import Sequence

from eventing.wire.generation import Choice, CompletionTokensDetails, FinishReason, Timings, TokenEvent, TokenLogprob
from functions.gateway.answers.client_limits import Leave
from functions.gateway.answers.gen_ai import Operation, answered
from functions.gateway.answers.metrics import GatewayMetrics
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.text.text_stream import TextStream
from functions.observing.tracing import Span


class Answer:
    """`take` until it is `done`; or `close` it where nobody listens any more."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        token_stream: TokenStream,
        text_stream: TextStream,
        metrics: GatewayMetrics,
        span: Span,
        operation: Operation,
        leave: Leave,
        echo: str | None = None,
        *,
        scored: bool = False,
    ) -> None:
        """echo: the prompt's text, where the answer begins with it. scored: with the log-probabilities of its tokens."""
        self.prompt_ids = prompt_ids
        self.prompt_tokens = len(prompt_ids)
        self.token_stream = token_stream
        self.done = False
        """All of it has been given out."""
        self._text_stream = text_stream
        self._metrics = metrics
        self._span = span
        self._operation = operation
        self._leave = leave
        self._echo = echo
        self._scored = scored
        self._logprobs: list[TokenLogprob] = []
        self._token_ids: list[int] = []
        self._taken = 0
        """Tokens of the answer itself."""
        self._given = 0
        """Tokens given out; the others wait until their text is certain."""
        self._text: list[str] = []
        self._certain = ""
        """Text that is certain and not given out, because the token that completed it waits."""
        self._measured = 0
        """Tokens whose time has been observed."""
        self._closed = False

    def take(self, seconds: float) -> list[TokenEvent]:
        """What can be given out, once a token has come or `seconds` are over.

        A token is given out once its text is certain, so all texts together are the answer's. Raises the Problem that ended the
        answer before its time.
        """
        token_id = self.token_stream.next_token(seconds)
        if token_id is not None:
            self._begin()
            self._take(token_id)
            if not self._text_stream.stopped:
                return self._give(len(self._token_ids) - self._text_stream.holds)
        elif not self.token_stream.ended:
            return []
        self._begin()
        self._certain += self._text_stream.finish()
        given = self._give(len(self._token_ids))
        self.done = True
        self.close()
        return given

    def close(self) -> None:
        """Frees what the answer holds, if it has not ended by itself, and counts how it ended."""
        if self._closed:
            return
        self._closed = True
        if not self.token_stream.ended:
            self.token_stream.cancel("stop" if self._text_stream.stopped else "cancelled")
        self._leave(self.prompt_tokens + self.token_stream.completion_tokens)
        self._measure()
        self._metrics.answers.labels(self.outcome).inc()
        problem = self.token_stream.problem
        error = None if problem is None else problem.name
        self._span.end(error, answered(self.outcome, error, self.completion_tokens, self.token_stream.cached_tokens))
        times = self.timings()
        failed = error or ("cancelled" if self.outcome == "cancelled" else None)
        seconds = (times.total_seconds, times.time_to_first_token_seconds)
        self._metrics.gen_ai.observe(self._operation, failed, *seconds, self.completion_tokens)

    def choice(self) -> Choice:
        """After the last token."""
        logprobs = tuple(self._logprobs) or None
        return Choice(self.text, tuple(self._token_ids), self._finish_reason(), logprobs)

    @property
    def text(self) -> str:
        """What was given out so far."""
        return "".join(self._text)

    @property
    def outcome(self) -> str:
        problem = self.token_stream.problem
        return self._finish_reason() if problem is None else problem.name

    @property
    def completion_tokens(self) -> int:
        """Behind a stop string more may have been computed, which is no part of the answer."""
        return self._taken if self._text_stream.stopped else self.token_stream.completion_tokens

    @property
    def draft_tokens(self) -> CompletionTokensDetails:
        return CompletionTokensDetails(self.token_stream.draft_tokens_accepted, self.token_stream.draft_tokens_rejected)

    def timings(self) -> Timings:
        seen = self.token_stream.timings()
        total = seen.total_seconds or 0.0
        first = total if seen.time_to_first_token_seconds is None else seen.time_to_first_token_seconds
        decoding = total - first
        rate = (self.completion_tokens - 1) / decoding if self.completion_tokens > 1 and decoding > 0 else 0.0
        return Timings(seen.queue_seconds or 0.0, first, total, rate, seen.replays)

    def _begin(self) -> None:
        """With the prompt, where it is wanted; only once its log-probabilities are there."""
        if self._echo is None:
            return
        self._certain, self._echo = self._echo, None
        self._token_ids += self.prompt_ids
        if self._scored:
            self._logprobs += [TokenLogprob(self.prompt_ids[0], None), *self.token_stream.prompt_logprobs()]

    def _take(self, token_id: int) -> None:
        self._measure()
        self._metrics.tokens.inc()
        self._token_ids.append(token_id)
        logprob = self.token_stream.logprob(self._taken)
        self._taken += 1
        if logprob is not None:
            self._logprobs.append(logprob)
        self._certain += self._text_stream.push(token_id)

    def _measure(self) -> None:
        """When the pipeline drew its tokens, whatever became of the answer, and however slowly it is read."""
        for seconds in self.token_stream.waits(self._measured):
            (self._metrics.inter_token if self._measured else self._metrics.first_token).observe(seconds)
            self._measured += 1

    def _give(self, end: int) -> list[TokenEvent]:
        """Tokens up to `end`; the last of them carries all the text that is certain."""
        given = []
        for index in range(self._given, end):
            text = self._certain if index == end - 1 else ""
            if text:
                self._text.append(text)
                self._certain = ""
            logprob = self._logprobs[index] if self._logprobs else None
            given.append(TokenEvent(index, self._token_ids[index], text, logprob=logprob))
        self._given = max(self._given, end)
        return given

    def _finish_reason(self) -> FinishReason:
        return "stop" if self._text_stream.stopped else self.token_stream.finish_reason or "cancelled"
