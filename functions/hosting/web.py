"""What the Flask applications of all functions share: probes, metrics, and errors as problem documents."""

import logging
from collections.abc import Callable, Mapping

import msgspec
from flask import Flask, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from eventing.problems import PROBLEM_CONTENT_TYPE, EventTooLarge, Problem

_log = logging.getLogger(__name__)


def json_response(document: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(document), status, content_type="application/json")


def problem_response(problem: Problem) -> Response:
    return Response(problem.document(), problem.status, content_type=PROBLEM_CONTENT_TYPE)


def add_probes(
    app: Flask,
    registry: CollectorRegistry,
    *,
    sick: Callable[[], str | None],
    ready: Callable[[], tuple[bool, Mapping[str, object]]],
) -> None:
    """`/healthz`, `/readyz` and `/metrics`. `sick` says what is wrong, if anything; `ready` comes with details."""

    @app.get("/healthz")
    def healthz() -> Response:
        cause = sick()
        return json_response({"alive": cause is None, "cause": cause}, 200 if cause is None else 503)

    @app.get("/readyz")
    def readyz() -> Response:
        is_ready, details = ready()
        return json_response({"ready": is_ready, **details}, 200 if is_ready else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


def add_problem_handlers(app: Flask) -> None:
    """Whatever is raised becomes a problem document; what nobody expected is logged with its traceback."""

    @app.errorhandler(Problem)
    def refused(problem: Problem) -> Response:
        return problem_response(problem)

    @app.errorhandler(RequestEntityTooLarge)
    def too_large(_: RequestEntityTooLarge) -> Response:
        return problem_response(EventTooLarge(f"the body has more than {app.config['MAX_CONTENT_LENGTH']} bytes"))

    @app.errorhandler(HTTPException)
    def not_served(error: HTTPException) -> Response:
        document = {"type": "about:blank", "title": error.name, "status": error.code, "detail": error.description}
        response = Response(msgspec.json.encode(document), error.code, content_type=PROBLEM_CONTENT_TYPE)
        for name, value in error.get_headers():
            if name.lower() == "allow":
                response.headers[name] = value
        return response

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        _log.error("unexpected error", exc_info=error)
        return problem_response(Problem(f"{type(error).__name__}; the log of this instance has the traceback"))
