"""Turns a request into prompts for the scheduler, and the tokens drawn for them into answers. Knows no HTTP."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from eventing.problems import ContextExceeded, InvalidRequest, Problem
from eventing.wire.events import Grammar, Pooling
from eventing.wire.generation import GenerateRequest
from eventing.wire.tools import NamedTool
from functions.configuration.api_keys import Quota
from functions.gateway.answers.adapters import ServedModels
from functions.gateway.answers.answer import Answer
from functions.gateway.answers.client_limits import ClientLimits, Release
from functions.gateway.answers.generation import Generation
from functions.gateway.answers.metrics import GatewayMetrics, GenAIOperation
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.scheduling.sequence import Prompt
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.text.text_stream import TextStream
from functions.gateway.text.tokenizer import ModelText
from functions.observing.tracing import PASSING, TraceContext, Tracer
from storage.models.embedder import Embedder

T = TypeVar("T")

BACKGROUND: Final = 10**13  # more than the priorities of clients differ
MAX_LOGPROBS: Final = 2**17  # of one request; they are in memory until its reply has been sent, with 350 to 450 bytes each


@dataclass(frozen=True, slots=True)
class RequestContext:
    request_id: str
    client_id: str  # the scheduler shares the pipeline fairly between clients
    seed: int  # used if the request names none
    deadline_seconds: float  # from `arrived` on
    arrived: float  # in time.monotonic()
    max_logprobs: int = MAX_LOGPROBS  # of all answers together, with the alternatives
    gone: Callable[[], bool] = lambda: False  # tells whether the client has left, without waiting
    trace: TraceContext | None = None  # of the client's span, if it sent one
    in_background: bool = False  # all other requests go first, and only the budgets of its client's limits count
    secret: str = field(default_factory=lambda: secrets.token_hex(16))  # unguessable, unlike the id, which a client may choose


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    token_ids: Sequence[int]
    predicted_ids: Sequence[int]  # tokens of a text that the answer is expected to repeat, from which tokens are drafted
    text: str = ""  # the prompt's text, if it is needed for `echo`
    grammar: Grammar | None = None  # that the answer must follow; None: any text


@dataclass(eq=False)
class AnswerService:
    """Begins the answers to requests: checks and encodes each request and submits its prompts. Thread-safe."""

    text: ModelText
    scheduler: Scheduler
    metrics: GatewayMetrics
    tracer: Tracer = PASSING
    limits: ClientLimits = field(default_factory=lambda: ClientLimits(Quota()))
    models: ServedModels = field(default_factory=lambda: ServedModels("", None))
    embedder: Embedder | None = None  # if the model makes vectors of texts; None: it generates tokens

    def begin(self, request: GenerateRequest, context: RequestContext) -> Generation:
        """Begins all answers to a request, or none, and returns without waiting for tokens.

        The caller closes the Generation. Raises InvalidRequest, MalformedEvent, ModelNotFound, QueueFull, RateLimited,
        NotReady.
        """
        if self.embedder is not None:
            what = "scores pairs of texts" if self.embedder.classifies else "makes vectors of texts"
            path = "/v1/score or /v1/rerank" if self.embedder.classifies else "/v1/embeddings"
            raise InvalidRequest(f"the model {self.models.model} {what} and generates no tokens; ask {path}")
        model = request.model or self.models.model
        adapter = self.models.adapter(model, context.request_id)
        operation = GenAIOperation.of(request, self.models.model, self.models.label(model))
        count = request.n * len(request.prompts)
        release = self.limits.admit(context.client_id, count, in_background=context.in_background)
        answers: list[Answer] = []
        try:
            prompts = self._encode_prompts(request, context.client_id)
            lengths = self._answer_lengths(request, prompts, context)
            for number, one in enumerate(request.each(context.seed)):
                prompt = number // request.n
                answers.append(
                    self._begin_answer(
                        one, prompts[prompt], lengths[prompt], context, release, operation, adapter, only=count == 1
                    )
                )
        except BaseException as error:
            for answer in answers:
                answer.close()
            for _ in range(count - len(answers)):
                release(0)
            if isinstance(error, RecursionError):
                raise InvalidRequest("the request's tools, schema or arguments are nested too deeply") from None
            raise
        return Generation(context.request_id, request, answers, context.gone, self.metrics)

    def submit_text(self, token_ids: Sequence[int], context: RequestContext, pooling: Pooling | None) -> TokenStream:
        """Submits a text of which the stages make a vector. Raises QueueFull, NotReady.

        If `pooling` is None, pools as the model is published, or takes the last token for a model that generates tokens.
        """
        embedder = self.embedder
        return self.scheduler.submit(
            Prompt(
                token_ids,
                max_tokens=0,
                pooling=pooling or (Pooling.LAST if embedder is None else Pooling(embedder.pooling)),
                in_one_chunk=embedder is not None and embedder.in_one_chunk,
                client_id=context.client_id,
                priority=(self.limits.quota(context.client_id).priority or 0) - BACKGROUND * context.in_background,
                deadline_seconds=context.deadline_seconds,
                arrived=context.arrived,
                trace=context.trace,
                request_id=context.request_id,
            )
        )

    def use_text(self, client_id: str, work: Callable[[ModelText], T], tokens: Callable[[T], int] = lambda _: 0) -> T:
        """Runs `work` for a request that needs the tokenizer but no stage, such as /tokenize, and returns its result.

        Meanwhile the request counts as waiting and as one of its client's answers. `tokens` returns how many tokens of the
        result count for the client's limits. Raises InvalidRequest, QueueFull, RateLimited, NotReady, and what `work` raises.
        """
        release = self.limits.admit(client_id)
        used = 0
        try:
            with self.scheduler.entering(client_id):
                result = work(self.text)
            used = tokens(result)
            return result
        finally:
            release(used)

    def _encode_prompts(self, request: GenerateRequest, client_id: str) -> list[EncodedPrompt]:
        """Encodes the request's prompts. Checks lengths and the queue before it renders, tokenizes or compiles anything."""
        if request.messages is not None:
            self.text.check_messages(request.messages, request.tools)
        for prompt in request.prompts:
            if isinstance(prompt, str):
                self.text.encoder.check(len(prompt))
            elif prompt is not None:
                self.text.check_ids(prompt)
        self.text.encoder.check(len(request.prediction))
        with self.scheduler.entering(client_id):
            grammar = self._grammar(request)
            predicted = self.text.encoder.encode(request.prediction, add_special_tokens=False) if request.prediction else []
            return [replace(self._encode(request, prompt, predicted), grammar=grammar) for prompt in request.prompts]

    def _grammar(self, request: GenerateRequest) -> Grammar | None:
        """Returns the grammar of forced tool calls or of `structured_outputs`. None if the answer may be any text.

        Raises MalformedEvent if the grammar cannot be used.
        """
        if forced := request.forced_tools:
            tools = self.text.tools
            several = request.parallel_tool_calls and not isinstance(request.tool_choice, NamedTool)
            return self.text.grammars.of(tools.format.grammar(forced, several, tools.special))
        return None if request.structured_outputs is None else self.text.grammars.of(request.structured_outputs)

    def _encode(self, request: GenerateRequest, prompt: str | Sequence[int] | None, predicted_ids: list[int]) -> EncodedPrompt:
        if request.messages is not None:
            values, effort = request.chat_template_kwargs, request.reasoning_effort
            token_ids = self.text.encode_messages(request.messages, values, request.callable_tools, effort)
            return EncodedPrompt(token_ids, predicted_ids)
        if prompt is None or isinstance(prompt, str):
            return EncodedPrompt(self.text.encoder.encode(prompt or ""), predicted_ids, prompt or "")
        return EncodedPrompt(prompt, predicted_ids, self.text.decode(prompt) if request.echo else "")

    def _begin_answer(
        self,
        request: GenerateRequest,
        encoded: EncodedPrompt,
        max_tokens: int,
        context: RequestContext,
        release: Release,
        operation: GenAIOperation,
        adapter: bytes,
        *,
        only: bool,
    ) -> Answer:
        token_ids = encoded.token_ids
        attributes = operation.begin_attributes(request, context.request_id, len(token_ids), max_tokens)
        span = self.tracer.serve(f"{operation.name} {operation.model}", context.trace, attributes)
        prompt = Prompt(
            token_ids,
            max_tokens,
            open_ended=request.max_tokens != max_tokens,
            sampling=request.sampling(context.seed, len(token_ids), self.text.eos_ids, encoded.grammar),
            predicted_ids=encoded.predicted_ids,
            eos_ids=request.end_ids(self.text.eos_ids),
            kept_end_ids=frozenset(request.stop_token_ids if request.include_stop_str_in_output else ()),
            top_logprobs=request.logprobs,
            scored=request.scored,
            adapter=adapter,
            client_id=context.client_id,
            cache_salt=request.cache_salt or "",
            request_secret=context.secret,
            is_only_answer=only,
            priority=(self.limits.quota(context.client_id).priority or 0) - BACKGROUND * context.in_background,
            deadline_seconds=context.deadline_seconds,
            arrived=context.arrived,
            trace=span.context,
            request_id=context.request_id,
        )
        try:
            token_stream = self.scheduler.submit(prompt)
        except Problem as problem:
            span.end(problem.name, {"error.type": problem.name})
            raise
        self.metrics.prompt_tokens.inc(len(token_ids))
        tools = self.text.tools
        marked_specially = tools.format.marker in tools.special  # a call begins with a special token
        text_stream = TextStream(
            self.text.tokenizer,
            request.stop_strings,
            () if request.messages is not None else token_ids,  # a message is a text of its own, a completion continues one
            stop_included=request.include_stop_str_in_output,
            special=bool(request.callable_tools) and marked_specially,
        )
        echo = encoded.text if request.echo else None
        return Answer(token_ids, token_stream, text_stream, self.metrics, span, operation, release, echo, request.scores)

    def _answer_lengths(self, request: GenerateRequest, prompts: Sequence[EncodedPrompt], context: RequestContext) -> list[int]:
        """Returns the most tokens that an answer to each prompt may have.

        These are as many as requested, or fewer if the context or the client's quota is smaller. Raises InvalidRequest for an
        empty prompt, and ContextExceeded if no token is left for an answer.

        The log-probabilities of one request are limited. If there may be more, answers without `max_tokens` become shorter.
        Otherwise InvalidRequest is raised.
        """
        most = self.limits.quota(context.client_id).max_tokens or self.text.context_length
        if request.max_tokens is not None:
            most = min(most, request.max_tokens)
        lengths = []
        for prompt in prompts:
            if not prompt.token_ids:
                raise InvalidRequest("the prompt has no tokens")
            left = self.text.context_length - len(prompt.token_ids)
            if left < (0 if request.max_tokens == 0 else 1):
                seen = f"your prompt has {len(prompt.token_ids)} tokens, and the answer needs some too"
                raise ContextExceeded.by(seen, self.text.context_length)
            lengths.append(min(left, most))
        if request.logprobs is None and not request.scored:
            return lengths
        each = 1 + (request.logprobs or 0)
        echoed = sum(len(prompt.token_ids) for prompt in prompts) if request.scored else 0
        if request.max_tokens is None:
            allowed = (context.max_logprobs // (each * request.n) - echoed) // len(prompts)
            lengths = [min(length, max(1, allowed)) for length in lengths]
        tokens = echoed + sum(lengths)
        if (product := request.n * tokens * each) > context.max_logprobs:
            raise InvalidRequest(
                f"{request.n} × {tokens} tokens (of all prompts and answers) × {each} log-probabilities of each are {product}; "
                f"one request may have {context.max_logprobs}. Lower `max_tokens`, `n` or `top_logprobs`, or send fewer prompts"
            )
        return lengths
