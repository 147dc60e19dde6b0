"""What a Flask application needs of the server: errors as problem documents."""

import logging

import msgspec
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from eventing.problems import PROBLEM_CONTENT_TYPE, EventTooLarge, Problem
from functions.hosting.requests import REFUSED

_log = logging.getLogger(__name__)


def json_response(document: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(document), status, content_type="application/json")


def problem_response(problem: Problem) -> Response:
    return with_problem_headers(Response(problem.document(), problem.status, content_type=PROBLEM_CONTENT_TYPE), problem)


def with_problem_headers(response: Response, problem: Problem) -> Response:
    """Adds the headers that go with the problem, Retry-After and WWW-Authenticate, and returns the response."""
    response.headers.update(problem.headers())
    return response


def not_served(error: HTTPException) -> Response:
    """The reply for an unknown path or method."""
    document = {"type": "about:blank", "title": error.name, "status": error.code, "detail": error.description}
    return with_allow(Response(msgspec.json.encode(document), error.code, content_type=PROBLEM_CONTENT_TYPE), error)


def with_allow(response: Response, error: HTTPException) -> Response:
    """Adds the error's Allow header, if it has one, to the response and returns it."""
    for name, value in error.get_headers():
        if name.lower() == "allow":
            response.headers[name] = value
    return response


def add_problem_handlers(app: Flask) -> None:
    """Makes `app` answer every exception with a problem document. Unexpected ones are logged with their traceback.

    Requests that the server has refused by their head (REFUSED) are answered in the same way.
    """

    @app.before_request
    def refuse() -> Response | None:
        if REFUSED in request.environ:
            raise request.environ.pop(REFUSED)  # a raised exception holds the environ, by the frames of its traceback
        if request.environ["PATH_INFO"] == "*":  # OPTIONS for the server as a whole (RFC 9110, section 9.3.7)
            return Response(status=204, headers={"Allow": "GET, HEAD, OPTIONS, POST"})
        return None

    @app.teardown_request
    def forget_routing(_: BaseException | None) -> None:
        request.routing_exception = None  # its frames hold the request

    @app.errorhandler(Problem)
    def refused(problem: Problem) -> Response:
        return problem_response(problem)

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(_: RequestEntityTooLarge) -> Response:
        return problem_response(EventTooLarge(f"the body has more than {app.config['MAX_CONTENT_LENGTH']} bytes"))

    app.register_error_handler(HTTPException, not_served)

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        _log.error("unexpected error", exc_info=error)
        return problem_response(Problem(f"{type(error).__name__}; the log of this instance has the traceback"))
