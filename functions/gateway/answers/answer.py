"""One answer as it is generated: its tokens, the text that they complete, its end and its timings. Knows no HTTP."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

from eventing.wire.generation import Choice, FinishReason, Timings, TokenEvent, TokenLogprob
from functions.gateway.answers.client_limits import Release
from functions.gateway.answers.metrics import GatewayMetrics, GenAIOperation, end_attributes
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.text.text_stream import TextStream
from functions.observing.tracing import Span


@dataclass(eq=False)
class Answer:
    """One answer while it is generated. Call `take` until `done` is true, or `close` to cancel. One thread at a time."""

    prompt_ids: Sequence[int]
    token_stream: TokenStream
    _text_stream: TextStream
    _metrics: GatewayMetrics
    _span: Span  # ended with the answer
    _operation: GenAIOperation
    _release: Release  # called at the end with the number of tokens of prompt and answer; 0 if nothing of it was computed
    _echo: str | None = None  # the prompt's text if the answer begins with it
    _scored: bool = False  # with `_echo`, the answer also has log-probabilities of the prompt's tokens
    done: bool = False  # `take` has returned the last token
    _token_ids: list[int] = field(default_factory=list)  # with echo, those of the prompt come first
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _taken: int = 0  # tokens of the answer received so far, without an echoed prompt
    _given: int = 0  # tokens that `take` has returned; the others wait until their text is certain
    _text: list[str] = field(default_factory=list)
    _certain: str = ""  # text that is certain and not yet returned with a token
    _measured: int = 0  # tokens whose latency has been recorded
    _closed: bool = False

    def take(self, seconds: float) -> list[TokenEvent]:
        """Waits up to `seconds` for a token. Returns the tokens whose text has become certain, which may be none.

        Text is certain when its characters are complete and no stop string can begin in it. The texts of all returned tokens
        together are the answer's text. Raises the Problem that ended the answer early.
        """
        token_id = self.token_stream.next_token(seconds)
        if token_id is not None:
            self._put_echo()
            self._put(token_id)
            if not self._text_stream.stopped:
                return self._give(len(self._token_ids) - self._text_stream.holds)
        elif not self.token_stream.ended:
            return []
        elif self.token_stream.problem is not None:  # it failed after `next_token` had waited in vain
            raise copy(self.token_stream.problem)
        self._put_echo()
        self._certain += self._text_stream.finish()
        given = self._give(len(self._token_ids))
        self.done = True
        self.close()
        return given

    def close(self) -> None:
        """Cancels the answer if it is unfinished, calls `release`, and records how it ended in metrics and span.

        Later calls do nothing.
        """
        if self._closed:
            return
        self._closed = True
        if not self.token_stream.ended:
            self.token_stream.cancel("stop" if self._text_stream.stopped else "cancelled")
        begun = self.token_stream.timings().queue_seconds is not None
        self._release(len(self.prompt_ids) + self.token_stream.completion_tokens if begun else 0)
        self._measure()
        self._metrics.answers.labels(self.outcome).inc()
        problem = self.token_stream.problem
        error = None if problem is None else problem.name
        self._span.end(error, end_attributes(self.outcome, error, self.completion_tokens, self.token_stream.cached_tokens))
        timings = self.timings()
        failure = error or ("cancelled" if self.outcome == "cancelled" else None)
        total_seconds, first_seconds = timings.total_seconds, timings.time_to_first_token_seconds
        self._metrics.judge(problem, self.outcome, first_seconds, total_seconds, self.completion_tokens)
        self._metrics.gen_ai.observe(self._operation, failure, total_seconds, first_seconds, self.completion_tokens)

    def choice(self) -> Choice:
        """Returns the complete answer, for the reply. Call it only when `done` is true."""
        return Choice(self.text, tuple(self._token_ids), self._finish_reason(), tuple(self._logprobs) or None)

    @property
    def text(self) -> str:
        """The text that `take` has returned so far."""
        return "".join(self._text)

    @property
    def outcome(self) -> str:
        problem = self.token_stream.problem
        return self._finish_reason() if problem is None else problem.name

    @property
    def completion_tokens(self) -> int:
        """Tokens of the answer so far, without those that were computed after a stop string."""
        return self._taken if self._text_stream.stopped else self.token_stream.completion_tokens

    def timings(self) -> Timings:
        seen = self.token_stream.timings()
        total = seen.total_seconds or 0.0
        first = total if seen.time_to_first_token_seconds is None else seen.time_to_first_token_seconds
        decoding = total - first
        rate = (self.completion_tokens - 1) / decoding if self.completion_tokens > 1 and decoding > 0 else 0.0
        return Timings(seen.queue_seconds or 0.0, first, total, rate, seen.replays)

    def _put_echo(self) -> None:
        """Puts the prompt's tokens and text before the answer's, once, if the request asked for `echo`.

        Call it at the first token or at the end: only then are the prompt's log-probabilities complete.
        """
        if self._echo is None:
            return
        self._certain, self._echo = self._echo, None
        self._token_ids += self.prompt_ids
        if self._scored:
            self._logprobs += [TokenLogprob(self.prompt_ids[0], None), *self.token_stream.prompt_logprobs()]

    def _put(self, token_id: int) -> None:
        self._measure()
        self._metrics.tokens.inc()
        if self._operation.adapter:
            self._metrics.adapter_tokens.labels(self._operation.adapter).inc()
        self._token_ids.append(token_id)
        if self.token_stream.logprobs:
            self._logprobs.append(self.token_stream.logprobs[self._taken])
        self._taken += 1
        self._certain += self._text_stream.push(token_id)

    def _measure(self) -> None:
        """Records the latency of each new token in the metrics.

        The latency is measured when the pipeline draws the token, not when the client reads it.
        """
        for seconds in self.token_stream.waits(self._measured):
            (self._metrics.inter_token if self._measured else self._metrics.first_token).observe(seconds)
            self._measured += 1

    def _give(self, end: int) -> list[TokenEvent]:
        """Returns events for the tokens up to index `end` that were not returned yet. The last one carries all certain text."""
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
