"""Answers one line of a batch as the OpenAI API answers the request in it.

The same line gets the same bytes at every gateway.
"""

import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from msgspec import Struct

from eventing.problems import InvalidRequest, MalformedEvent, Problem
from functions.configuration.config import GatewayConfig
from functions.gateway.answers.generation import ClientLeft, Generation
from functions.gateway.answers.service import AnswerService, RequestContext
from functions.gateway.answers.vectors import VectorService
from functions.gateway.jobs.batches import BatchJob
from functions.gateway.jobs.results import LineResult
from functions.gateway.openai.api import ENDPOINTS
from functions.gateway.openai.documents import Envelope
from functions.gateway.openai.embeddings import EMBEDDINGS, EmbeddingRequest, embeddings_document
from functions.gateway.openai.errors import refusal, unknown_model
from functions.gateway.openai.validation import read_request

_log: Final = logging.getLogger(__name__)

BATCH_ENDPOINTS: Final = (*ENDPOINTS, EMBEDDINGS)
_DELAYED_STATUSES: Final = (429, 503, 504)


class LineDelayed(Exception):
    """The line cannot be answered now and is tried again later. The exception's cause is the Problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class BatchLine(Struct, frozen=True):
    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


@dataclass(frozen=True, slots=True)
class LinePlace:
    job: BatchJob
    part: int
    number: int  # in its part
    line: bytes

    def digest(self) -> bytes:
        return hashlib.sha256(f"{self.job.id} {self.part} {self.number}".encode()).digest()


@dataclass(frozen=True, slots=True)
class LineAnswerer:
    """Answers lines of batches with the gateway's AnswerService. Thread-safe."""

    _service: Callable[[], AnswerService]  # raises NotReady before the tokenizer is loaded
    _config: GatewayConfig
    # Entered for each line, raises NotReady as well. Gets whether the line's batch is late.
    _turn: Callable[[bool], AbstractContextManager[object]] = nullcontext

    def answer(
        self, place: LinePlace, late: bool, gone: Callable[[], bool], begun: Callable[[Generation], object]
    ) -> LineResult:
        """Answers a line and returns the result. A line that cannot be served is answered with its error.

        `late` says whether the batch is late. `begun` is called when the answer begins. If `gone` returns True, the line is
        given up and ClientLeft is raised. Raises LineDelayed if a later try may succeed.
        """
        try:
            with self._turn(late):
                return self._answer(place, gone, begun)
        except ClientLeft:
            raise
        except Problem as problem:
            if problem.status in _DELAYED_STATUSES or problem.status >= 500:
                raise LineDelayed(problem) from problem
            return self.refused(place, problem)
        except Exception as error:
            _log.exception("line %d of part %d of %s failed", place.number, place.part, place.job.id)
            raise LineDelayed(Problem(f"{type(error).__name__}; the log of a gateway has the traceback")) from error

    def _answer(self, place: LinePlace, gone: Callable[[], bool], begun: Callable[[Generation], object]) -> LineResult:
        job = place.job
        try:
            line = msgspec.json.decode(place.line, type=BatchLine)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise MalformedEvent(f"the line is no request with custom_id, method, url and body: {error}") from error
        if line.url != job.endpoint or line.method != "POST":
            raise InvalidRequest(f"the line asks {line.method[:20]} {line.url[:80]}; its batch asks POST {job.endpoint}")
        if job.endpoint == EMBEDDINGS:
            return self._embedded(place, bytes(line.body), gone)
        endpoint = ENDPOINTS[job.endpoint]
        body = read_request(bytes(line.body), endpoint.type_)
        if body.stream:
            raise InvalidRequest("`stream` is true; a batch has whole answers")
        try:
            request = body.generate_request()
        except ValueError as error:
            raise MalformedEvent(f"the request cannot be served: {error}") from error
        service, context = self._service(), _context(place, endpoint.id_prefix, gone)
        document = endpoint.document(Envelope(context.request_id, job.created_at, body.model, self._config.pipeline), body)
        generation = service.begin(request, context)
        begun(generation)
        for _ in generation.tokens():
            pass
        whole = document.whole(generation, service.text)
        usage = generation.usage()
        whole["usage"] = _repeatable(whole["usage"])
        return _result(place, 200, whole, usage.prompt_tokens, usage.completion_tokens)

    def _embedded(self, place: LinePlace, data: bytes, gone: Callable[[], bool]) -> LineResult:
        body = read_request(data, EmbeddingRequest)
        if body.model != self._config.model:
            return _result(place, 404, unknown_model(body.model, self._config.model))
        context = _context(place, "embd-", gone)
        whole = embeddings_document(VectorService(self._service), body, context, place.job.created_at)
        return _result(place, 200, whole, whole["usage"]["prompt_tokens"])

    def refused(self, place: LinePlace, problem: Problem) -> LineResult:
        return _result(place, *refusal(problem, place.job.endpoint))


def unanswered(place: LinePlace, code: str, message: str) -> LineResult:
    """Returns the error line for a request that was not answered before its batch ended."""
    return _line(place, {"response": None, "error": {"code": code, "message": message}}, failed=True)


def _context(place: LinePlace, id_prefix: str, gone: Callable[[], bool]) -> RequestContext:
    digest = place.digest()
    return RequestContext(
        request_id=id_prefix + digest[:12].hex(),
        client_id=place.job.client_id,
        seed=int.from_bytes(digest[12:20]) >> 1,
        deadline_seconds=max(1.0, place.job.expires_at - time.time()),
        arrived=time.monotonic(),
        gone=gone,
        in_background=True,
    )


def _result(place: LinePlace, status: int, body: dict[str, Any], input_tokens: int = 0, output_tokens: int = 0) -> LineResult:
    response = {"status_code": status, "request_id": f"req_{place.digest()[:12].hex()}", "body": body}
    return _line(place, {"response": response, "error": None}, status != 200, input_tokens, output_tokens)


def _line(place: LinePlace, outcome: dict[str, Any], failed: bool, input_tokens: int = 0, output_tokens: int = 0) -> LineResult:
    custom_id = None
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        custom_id = msgspec.json.decode(place.line, type=BatchLine).custom_id
    document = {"id": f"batch_req_{place.digest()[:12].hex()}", "custom_id": custom_id, **outcome}
    return LineResult(msgspec.json.encode(document) + b"\n", failed, input_tokens, output_tokens)


def _repeatable(usage: Any) -> Any:
    """Returns the usage without counts that depend on caches and drafts, because a second answer may differ in them."""
    counts: dict[str, Any] = {name: value for name, value in msgspec.to_builtins(usage).items() if isinstance(value, int)}
    if "input_tokens" in counts:  # of responses, whose type wants details
        counts["input_tokens_details"] = {"cached_tokens": 0, "cache_write_tokens": 0}
        counts["output_tokens_details"] = {"reasoning_tokens": 0}
    return counts
