"""Error handlers that every Flask application of a function needs: they reply with problem documents."""

import logging
from collections.abc import Mapping

import msgspec
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from eventing.problems import PROBLEM_CONTENT_TYPE, EventTooLarge, Problem
from functions.hosting.requests import REFUSED

_log = logging.getLogger(__name__)


def json_response(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(document), status, headers, content_type="application/json")


def problem_response(problem: Problem) -> Response:
    return Response(problem.document(), problem.status, problem.headers(), content_type=PROBLEM_CONTENT_TYPE)


def not_served(error: HTTPException) -> Response:
    """Returns the reply for an unknown path or method: a problem document."""
    document = {"type": "about:blank", "title": error.name, "status": error.code, "detail": error.description}
    return Response(msgspec.json.encode(document), error.code, allow_header(error), content_type=PROBLEM_CONTENT_TYPE)


def allow_header(error: HTTPException) -> dict[str, str]:
    return {name: value for name, value in error.get_headers() if name.lower() == "allow"}


def add_problem_handlers(app: Flask) -> None:
    """Makes `app` answer every exception with a problem document. Unexpected exceptions are logged with their traceback.

    Requests that the server has refused after reading their head (REFUSED) are answered in the same way.
    """

    @app.before_request
    def refuse() -> Response | None:
        if REFUSED in request.environ:
            raise request.environ.pop(REFUSED)  # a raised exception holds the environ, by the frames of its traceback
        if request.environ["PATH_INFO"] == "*":  # OPTIONS for the server as a whole (RFC 9110, section 9.3.7)
            return Response(status=204, headers={"Allow": "DELETE, GET, HEAD, OPTIONS, POST"})
        return None

    @app.teardown_request
    def forget_routing(_: BaseException | None) -> None:
        request.routing_exception = None  # its frames hold the request

    app.register_error_handler(Problem, problem_response)

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(_: RequestEntityTooLarge) -> Response:
        return problem_response(EventTooLarge(f"the body has more than {app.config['MAX_CONTENT_LENGTH']} bytes"))

    app.register_error_handler(HTTPException, not_served)

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        _log.error("unexpected error", exc_info=error)
        return problem_response(Problem(f"{type(error).__name__}; the log of this instance has the traceback"))
