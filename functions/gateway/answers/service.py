"""What both doors do: a request becomes prompts for the scheduler, the tokens that come become answers. Knows no HTTP."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from eventing.problems import ContextExceeded, InvalidRequest, Problem
from eventing.wire.events import Grammar
from eventing.wire.generation import GenerateRequest
from eventing.wire.tools import callable_tools, forced_tools
from functions.configuration.api_keys import Allowance
from functions.gateway.answers.answer import Answer
from functions.gateway.answers.client_limits import ClientLimits, Leave
from functions.gateway.answers.gen_ai import Operation
from functions.gateway.answers.generation import Generation
from functions.gateway.answers.metrics import GatewayMetrics
from functions.gateway.scheduling.prompt import Prompt
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.text.text_stream import TextStream
from functions.gateway.text.tokenizer import ModelText
from functions.observing.tracing import PASSING, TraceContext, Tracer


class Submitter(Protocol):
    """A Scheduler."""

    def entering(self) -> AbstractContextManager[None]:
        """For what is done to a request before `submit`: it counts as one that waits. Raises QueueFull, NotReady."""

    def submit(self, prompt: Prompt) -> TokenStream:
        """Tokens come by themselves. Raises QueueFull, NotReady, InvalidRequest."""


@dataclass(frozen=True, slots=True)
class RequestContext:
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


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt."""

    token_ids: Sequence[int]
    predicted_ids: Sequence[int]
    """Of the answer that is expected."""
    text: str = ""
    """For `echo`."""
    grammar: Grammar | None = None
    """Of the answer."""


class AnswerService:
    """Answers requests. Thread-safe."""

    def __init__(
        self,
        text: ModelText,
        scheduler: Submitter,
        metrics: GatewayMetrics,
        tracer: Tracer = PASSING,
        limits: ClientLimits | None = None,
        model: str = "",
    ) -> None:
        self.text = text
        self._limits = limits or ClientLimits(Allowance())
        self._scheduler = scheduler
        self._metrics = metrics
        self._tracer = tracer
        self._model = model

    def begin(self, request: GenerateRequest, asker: RequestContext) -> Generation:
        """Begins all that is to be answered. Raises InvalidRequest, QueueFull, RateLimited, NotReady."""
        wanted = request.n * len(request.prompts)
        leave = self._limits.enter(asker.client_id, wanted)
        answers: list[Answer] = []
        try:
            prompts = self._encoded(request)
            for number, one in enumerate(request.each(asker.seed)):
                answers.append(self._begun(one, prompts[number // request.n], asker, leave))
        except BaseException as error:
            for answer in answers:
                answer.close()
            for _ in range(wanted - len(answers)):
                leave(0)
            if isinstance(error, RecursionError):
                raise InvalidRequest("the request's tools, schema or arguments are nested too deeply") from None
            raise
        return Generation(asker.request_id, answers, request.n, asker.gone, self._metrics)

    def _begun(self, request: GenerateRequest, encoded: Encoded, asker: RequestContext, leave: Leave) -> Answer:
        token_ids = encoded.token_ids
        room = self._room(token_ids, request.max_tokens)
        allowed = self._limits.allowance(asker.client_id)
        most = min(room, allowed.max_tokens or room)
        max_tokens = most if request.max_tokens is None else min(request.max_tokens, most)
        operation = Operation.of(request, self._model)
        asked = operation.asked(request, asker.request_id, len(token_ids), max_tokens)
        span = self._tracer.serve(operation.span, asker.trace, asked)
        prompt = Prompt(
            token_ids,
            max_tokens,
            open_ended=request.max_tokens is None or request.max_tokens > most,
            sampling=request.sampling(asker.seed, len(token_ids), self.text.eos_ids, encoded.grammar),
            predicted_ids=encoded.predicted_ids,
            eos_ids=request.end_ids(self.text.eos_ids),
            kept_end_ids=frozenset(request.stop_token_ids if request.include_stop_str_in_output else ()),
            top_logprobs=request.logprobs,
            # Where nothing is drawn something has to be computed.
            scored=request.scores or request.max_tokens == 0,
            client_id=asker.client_id,
            priority=allowed.priority or 0,
            deadline_seconds=asker.deadline_seconds,
            arrived=asker.arrived,
            trace=span.context,
            request_id=asker.request_id,
        )
        try:
            token_stream = self._scheduler.submit(prompt)
        except Problem as problem:
            span.end(problem.name, {"error.type": problem.name})
            raise
        self._metrics.prompt_tokens.inc(len(token_ids))
        # A message is a text of its own; what continues a prompt is read behind it.
        before = () if request.messages is not None else token_ids
        text_stream = TextStream(
            self.text.tokenizer,
            request.stop_strings,
            before,
            stop_included=request.include_stop_str_in_output,
            special=bool(callable_tools(request.tools, request.tool_choice)) and self.text.tools.marked_specially,
        )
        echo = encoded.text if request.echo else None
        return Answer(token_ids, token_stream, text_stream, self._metrics, span, operation, leave, echo, scored=request.scores)

    def _room(self, token_ids: Sequence[int], max_tokens: int | None) -> int:
        """For the answer. Raises InvalidRequest where there is none."""
        if not token_ids:
            raise InvalidRequest("the prompt has no tokens")
        context = self.text.context_length
        room = context - len(token_ids)
        if room < (0 if max_tokens == 0 else 1):
            raise ContextExceeded(
                f"the prompt has {len(token_ids)} tokens and the model's context is {context}, which must hold the answer too; "
                "shorten the prompt"
            )
        return room

    def _encoded(self, request: GenerateRequest) -> list[Encoded]:
        """Each prompt. Nothing is rendered, tokenized or compiled that cannot fit, or that would be refused afterwards."""
        if request.messages is not None:
            self.text.check_messages(request.messages, request.tools)
        for prompt in request.prompts:
            if isinstance(prompt, str):
                self.text.check(prompt)
            elif prompt is not None:
                self.text.check_ids(prompt)
        self.text.check(request.prediction)
        with self._scheduler.entering():
            grammar = self._grammar(request)
            predicted = self.text.encode_expected(request.prediction) if request.prediction else []
            return [replace(self._encode(request, prompt, predicted), grammar=grammar) for prompt in request.prompts]

    def _grammar(self, request: GenerateRequest) -> Grammar | None:
        """Raises MalformedEvent."""
        forced = forced_tools(request.tools, request.tool_choice)
        if forced:
            return self.text.grammars.of_tools(self.text.tools.grammar(forced, request.parallel_tool_calls))
        return None if request.structured_outputs is None else self.text.grammars.of(request.structured_outputs)

    def _encode(self, request: GenerateRequest, prompt: str | Sequence[int] | None, predicted: list[int]) -> Encoded:
        if request.messages is not None:
            tools = callable_tools(request.tools, request.tool_choice)
            return Encoded(self.text.encode_messages(request.messages, request.template_values, tools), predicted)
        if prompt is None or isinstance(prompt, str):
            return Encoded(self.text.encode(prompt or ""), predicted, prompt or "")
        text = self.text.tokenizer.decode(list(prompt), skip_special_tokens=False) if request.echo else ""
        return Encoded(prompt, predicted, text)
