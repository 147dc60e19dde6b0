"""Reasons to refuse an event as a whole, as exceptions and as problem documents (RFC 9457).

There is one class for each condition. The document's `type` tells refusals of Lamina from those of the infrastructure. The
statuses are chosen for Knative Eventing, which retries after 404, 408, 409, 429 and 5xx and never after another 4xx.
"""

from collections.abc import Iterator
from typing import ClassVar, Final, Self

import msgspec

PROBLEM_CONTENT_TYPE: Final = "application/problem+json"
_TYPE_PREFIX: Final = "urn:lamina:problem:"


class Problem(Exception):
    """Base class of the reasons to refuse an event. `str(problem)` says what was seen, and what to do."""

    status: ClassVar[int] = 500
    name: ClassVar[str] = "internal"
    title: ClassVar[str] = "Something failed inside; the log of the instance says what"

    retry_after_seconds: int | None = None  # the client gets it as Retry-After

    @property
    def type(self) -> str:
        return _TYPE_PREFIX + self.name

    def headers(self) -> dict[str, str]:
        """Returns the headers that every reply with this problem has: Retry-After, if `retry_after_seconds` is set."""
        return {} if self.retry_after_seconds is None else {"Retry-After": str(self.retry_after_seconds)}

    def document(self) -> bytes:
        """Returns the body of the reply, an `application/problem+json` document."""
        return msgspec.json.encode(
            {"type": self.type, "title": self.title, "status": self.status, "detail": str(self)},
        )


class MalformedEvent(Problem):
    """400. The event or its data cannot be read. A retry does not help."""

    status, name, title = 400, "malformed-event", "The event cannot be read"


class Unauthorized(Problem):
    """401. The bearer token is missing or wrong. A retry does not help."""

    status, name, title = 401, "unauthorized", "The bearer token is missing or wrong"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": 'Bearer realm="lamina"'}  # RFC 9110, section 15.5.2; RFC 6750, section 3


class CrossSite(Problem):
    """403. A browser sent the request for a page of another site. A retry does not help."""

    status, name, title = 403, "cross-site", "Pages of this site may not ask here"


class UnknownHost(Problem):
    """421. The Host header is no name of this function: a page of another site may have sent the request.

    A retry does not help.
    """

    status, name, title = 421, "unknown-host", "This function does not answer to that name"


class UnknownEventType(Problem):
    """400. This function does not serve events of this type. A retry does not help."""

    status, name, title = 400, "unknown-event-type", "This function does not serve events of this type"


class NotFound(Problem):
    """404. There is no such file or batch, or it belongs to another API key."""

    status, name, title = 404, "not-found", "There is no such object"


class ModelNotFound(NotFound):
    """404. The gateway serves no model or adapter of this name. A retry helps only after somebody has published one."""

    name, title = "model-not-found", "This model is not served here"


class EventExpired(Problem):
    """410. `expirytime` has passed, so nobody awaits the answer. A retry does not help."""

    status, name, title = 410, "event-expired", "The event expired before it was worked on"


class EventTooLarge(Problem):
    """413. The event has more bytes, rows or tokens than this function accepts. A retry does not help."""

    status, name, title = 413, "event-too-large", "The event is too large"


class UnsupportedMediaType(Problem):
    """415. The event is a Batch in structured mode, or its content type is not served. A retry does not help."""

    status, name, title = 415, "unsupported-media-type", "The content type or mode is not supported for this event"


class WrongPipeline(Problem):
    """421. The event has another fingerprint: other weights, cut, dtype or wire version. A retry does not help."""

    status, name, title = 421, "wrong-pipeline", "The event belongs to another pipeline"


class WrongLayer(Problem):
    """421. The event is for a layer that is not this stage's first layer. A retry does not help."""

    status, name, title = 421, "wrong-layer", "The event wants a layer that this stage does not begin with"


class InvalidRequest(Problem):
    """422. The request is well-formed, but its values cannot be served. A retry does not help."""

    status, name, title = 422, "invalid-request", "The request cannot be served as it is"


class ContextExceeded(InvalidRequest):
    """422. Prompt and answer do not fit into the model's context. A retry does not help."""

    name, title = "context-length-exceeded", "The model's context does not hold it"

    @classmethod
    def by(cls, seen: str, context_length: int) -> Self:
        """Makes the error with the OpenAI API's words, by which client programs recognize it.

        `seen` says what does not fit, as the rest of a sentence. `context_length` is in tokens.
        """
        return cls(
            f"This model's maximum context length is {context_length} tokens. However, {seen}. Please reduce its length."
        )


class QueueFull(Problem):
    """429. The bounded queue is full. A retry helps later."""

    status, name, title, retry_after_seconds = 429, "queue-full", "Too many requests wait already", 1


class RateLimited(Problem):
    """429. This client has reached one of its limits. A retry helps after Retry-After."""

    status, name, title = 429, "rate-limited", "This client asks for more than it may"
    retry_after_seconds: int | None = 1

    def __init__(self, detail: str, retry_after_seconds: int = 1) -> None:
        super().__init__(detail)
        self.retry_after_seconds = retry_after_seconds


class ReplaysExhausted(Problem):
    """500. A sequence has used up its retry budget: its route failed again and again. A retry seldom helps."""

    status, name, title = 500, "replays-exhausted", "The sequence broke its route too often"


class AdapterUnusable(Problem):
    """500. A stage cannot load the adapter of the request: its object is missing or altered. Publish the adapter again."""

    status, name, title = 500, "adapter-unusable", "A stage cannot use the adapter"


class NotReady(Problem):
    """503. The weights are not loaded yet, or the function is draining. A retry helps."""

    status, name, title, retry_after_seconds = 503, "not-ready", "This instance does not take work now", 1


class Overloaded(NotReady):
    """503. The bodies of all requests in memory have reached their limit of bytes. A retry helps a little later."""

    name, title = "overloaded", "This instance holds as much as it can"


class PipelineUnavailable(Problem):
    """503. A stage could not be reached or woken in time. A retry may help."""

    status, name, title = 503, "pipeline-unavailable", "A stage of the pipeline is not available"
    retry_after_seconds = 5


class DeadlineExceeded(Problem):
    """504. The answer took longer than allowed. A retry may help."""

    status, name, title = 504, "deadline-exceeded", "The answer took too long"


def _subclasses(problem: type[Problem]) -> Iterator[type[Problem]]:
    yield problem
    for each in problem.__subclasses__():
        yield from _subclasses(each)


PROBLEMS: Final = {_TYPE_PREFIX + problem.name: problem for problem in _subclasses(Problem)}  # every class, by its type


class _Document(msgspec.Struct):
    type: str = "about:blank"
    detail: str = ""


def problem_from_document(body: bytes) -> Problem | None:
    """Returns the exception that a reply's body describes; None if the body is not a problem document of Lamina."""
    try:
        document = msgspec.json.decode(body, type=_Document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    problem = PROBLEMS.get(document.type)
    return None if problem is None else problem(document.detail)
