"""Problem documents for requests that a stage does not serve and for events that failed, by Flask."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NoReturn

from flask import Flask, Response, request

from eventing.wire.kv_query import KV_PATH
from functions.hosting.web import add_problem_handlers
from functions.stage.serving.app import StageMetrics

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

# Keys of the WSGI environment of a refused event.
_ERROR: Final = "lamina.error"  # the exception
_EVENT_TYPE: Final = "lamina.event_type"  # label in metrics


class Refusals:
    """A WSGI application that refuses every request."""

    def __init__(self, metrics: StageMetrics, max_event_bytes: int) -> None:
        self._flask = Flask("stage", static_folder=None)
        self._flask.config["MAX_CONTENT_LENGTH"] = max_event_bytes
        self._metrics = metrics
        add_problem_handlers(self._flask)
        self._flask.post("/")(_raise_what_went_wrong)
        self._flask.get(KV_PATH)(_raise_what_went_wrong)
        self._flask.after_request(self._count)

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        return self._flask(environ, start_response)

    def refuse(
        self, environ: "WSGIEnvironment", start_response: "StartResponse", error: Exception, type_: str
    ) -> Iterable[bytes]:
        """Answers an event with its error. type_: label in metrics."""
        environ[_ERROR], environ[_EVENT_TYPE] = error, type_
        return self._flask(environ, start_response)

    def _count(self, response: Response) -> Response:
        if _EVENT_TYPE in request.environ:
            self._metrics.events.labels(request.environ[_EVENT_TYPE], str(response.status_code)).inc()
        return response


def _raise_what_went_wrong() -> NoReturn:
    """Flask's error handlers make a reply of the error."""
    raise request.environ[_ERROR]
