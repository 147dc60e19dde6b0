"""Replies with errors, in the shape of the OpenAI API."""

import logging
from typing import Any, Final

from flask import Blueprint, Response, request
from werkzeug.exceptions import HTTPException

from eventing.problems import ContextExceeded, InvalidRequest, ModelNotFound, Problem
from functions.gateway.answers.adapters import is_not_served
from functions.hosting.web import allow_header, json_response, not_served

_log: Final = logging.getLogger(__name__)
_PROMPT_PARAMETERS: Final = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
    "/v1/responses": "input",
    "/v1/embeddings": "input",
}


def add_error_handlers(routes: Blueprint) -> None:
    """Makes the routes answer every exception with an error in the shape of the OpenAI API."""
    routes.errorhandler(Problem)(refused)
    routes.errorhandler(HTTPException)(path_not_served)
    routes.errorhandler(Exception)(unexpected)


def refused(problem: Problem) -> Response:
    """Returns the reply for a Problem. Its status is the Problem's, but 400 for InvalidRequest, as in the OpenAI API."""
    status, document = refusal(problem, request.path)
    return json_response(document, status, problem.headers())


def refusal(problem: Problem, path: str) -> tuple[int, dict[str, Any]]:
    """Returns the status and the document of the reply for a Problem. `path` is the request's."""
    status = 400 if isinstance(problem, InvalidRequest) else problem.status
    parameter = _PROMPT_PARAMETERS.get(path) if isinstance(problem, ContextExceeded) else None
    if isinstance(problem, ModelNotFound):
        parameter = "model"
    return status, error_document(status, str(problem), problem.name, parameter)


def path_not_served(error: HTTPException) -> Response:
    """Returns the reply to a path or method without a route.

    Under /v1 it has the shape of the OpenAI API; elsewhere it is a problem document.
    """
    if not request.path.startswith("/v1"):
        return not_served(error)
    message = f"{request.method} {request.path}: {error.description or error.name}"
    document = error_document(error.code or 404, message, error.name.lower().replace(" ", "_"))
    return json_response(document, error.code or 404, allow_header(error))


def unexpected(error: Exception) -> Response:
    _log.error("unexpected error", exc_info=error)
    message = f"{type(error).__name__}; the log of this instance has the traceback"
    return json_response(error_document(500, message, "internal"), 500)


def unknown_model(requested: str, served: str) -> dict[str, Any]:
    return error_document(404, is_not_served(requested, served), "model_not_found", "model")


def error_document(status: int, message: str, code: str, parameter: str | None = None) -> dict[str, Any]:
    types = {401: "authentication_error", 429: "rate_limit_error"}
    kind = types.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code.replace("-", "_")}}
