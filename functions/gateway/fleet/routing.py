"""Sends each request of a fleet's clients to the member that its `model` names. Requests without a model are answered here."""

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, unquote

import msgspec
from flask import Blueprint, Flask, Response, request
from werkzeug.wsgi import ClosingIterator

from eventing.http.binding import STRUCTURED_CONTENT_TYPE
from eventing.problems import MalformedEvent, NotFound, NotReady, Problem
from eventing.wire.events import EventType
from functions.configuration.config import FleetConfig
from functions.gateway.answers.authentication import bearer_token
from functions.gateway.answers.metrics import GatewayMetrics
from functions.gateway.answers.sites import Sites
from functions.gateway.app import admit_body, base_app
from functions.gateway.fleet.grants import Grants
from functions.gateway.fleet.members import Members, Version
from functions.gateway.fleet.overview import FLEET_EVENTS, FleetState, Overview
from functions.gateway.fleet.parts import Parts
from functions.gateway.jobs.hold import HOLD_PATH
from functions.gateway.openai.errors import add_error_handlers, unknown_model
from functions.gateway.openai.tokens import VERSION
from functions.gateway.openapi.operations import operations
from functions.gateway.page.page import register_page
from functions.gateway.page.pipeline_state import PIPELINE_EVENTS
from functions.gateway.page.state_events import StateEventsAPI
from functions.hosting.requests import CLIENT_GONE, REFUSED, BodyStream
from functions.hosting.web import json_response

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

POST_PATHS: Final = frozenset(each.path for each in operations(with_page=False) if each.method == "post")
_WITHOUT_STAGES: Final = ("/tokenize", "/detokenize")  # the gateway answers them alone
_OF_JOBS: Final = ("/v1/files", "/v1/batches")
_ERROR: Final = "lamina.fleet.error"  # in the environ of a request that no member gets: a Problem, or the unknown model


class _Named(msgspec.Struct):
    model: str | None = None


class _StructuredEvent(_Named):
    data: msgspec.Raw = msgspec.Raw(b"{}")


def model_of(environ: "WSGIEnvironment") -> str | None:
    """Returns the model that a request names: in `?model=`, in an event's attribute `model`, or in its body or event data.

    Returns None if it names none. The body can be read again afterwards. Raises MalformedEvent for a body that is no JSON
    object.
    """
    query: str = environ.get("QUERY_STRING", "")
    if named := parse_qs(query).get("model"):
        return named[-1]
    if environ["REQUEST_METHOD"] != "POST":
        return None
    if attribute := environ.get("HTTP_CE_MODEL"):
        return unquote(attribute)
    body = environ["wsgi.input"].read()
    environ["wsgi.input"] = BodyStream(body)
    try:
        if environ.get("CONTENT_TYPE", "").startswith(STRUCTURED_CONTENT_TYPE):
            event = msgspec.json.decode(body, type=_StructuredEvent)
            return event.model or msgspec.json.decode(event.data, type=_Named).model
        return msgspec.json.decode(body, type=_Named).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        how = "; name it by the attribute `model`" if environ["PATH_INFO"] == "/" else ""
        raise MalformedEvent(f"the request names no model: {error}{how}") from error


@dataclass(frozen=True, slots=True)
class MemberRouter:
    """The WSGI application of a fleet's gateway: calls the application of the member that a request names."""

    _members: Members
    _parts: Parts
    _own: "WSGIApplication"  # answers what concerns no member, and errors
    _grants: Grants | None = None  # None: members need none

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        path, is_post = environ["PATH_INFO"], environ["REQUEST_METHOD"] == "POST"
        of_jobs = is_of_jobs(path)
        if REFUSED in environ or not (of_jobs or (path in POST_PATHS if is_post else path == PIPELINE_EVENTS)):
            return self._own(environ, start_response)
        leave = ExitStack()  # what must be undone when the answer has been sent
        secret = bearer_token(environ.get("HTTP_AUTHORIZATION", ""))
        try:
            if not self._members.listed.is_set():
                raise NotReady("this gateway does not know the fleet's members yet")
            if of_jobs:
                version = self._version_of_jobs(environ, secret)
            elif (named := model_of(environ)) is None:
                raise MalformedEvent("the request names no model, and a fleet serves several")
            elif (found := self._members.find(named, secret)) is not None:
                version = found
            else:
                environ[_ERROR] = named
                return self._own(environ, start_response)
            begins_batch = environ.get("HTTP_CE_TYPE") == EventType.BATCH_REQUEST
            computes = is_post and not of_jobs and not begins_batch and path not in _WITHOUT_STAGES
            if self._grants is not None and computes and version.config is not None:
                gone = environ.get(CLIENT_GONE, lambda: False)
                leave.enter_context(self._grants.turn(version, True, version.config.request_timeout_seconds, gone))
            part = leave.enter_context(self._parts.use(version))
            pieces = part.load(wakes=computes)(environ, start_response)
        except BaseException as error:
            leave.close()
            if not isinstance(error, Problem):
                raise
            environ[_ERROR] = error
            return self._own(environ, start_response)
        return ClosingIterator(pieces, leave.close)

    def _version_of_jobs(self, environ: "WSGIEnvironment", secret: str) -> Version:
        """Returns the version whose files and batches a request concerns. Raises NotFound or MalformedEvent.

        It is the version that `?model=` names, or else the only one that the API key opens. A request to HOLD_PATH concerns
        none, so any loaded version with batches takes it.
        """
        query: str = environ.get("QUERY_STRING", "")
        named = parse_qs(query)["model"][-1] if "model" in parse_qs(query) else None
        if environ["PATH_INFO"] == HOLD_PATH:  # asks for nothing: any part that works on batches holds it
            found = [each.version for each in self._parts.loaded() if each.function is not None and each.version.serves_batches]
        elif named is not None:
            found = [each for each in [self._members.find(named, secret)] if each is not None and each.serves_batches]
        else:
            found = self._members.with_batches(secret)
        if len(found) > 1 and environ["PATH_INFO"] != HOLD_PATH:
            models = ", ".join(sorted(each.model for each in found))
            raise MalformedEvent(f"several members serve batches: add ?model= to the URL, with one of {models}")
        if not found:
            whose = "no member of this fleet" if named is None else f"no member with the model {named}"
            raise NotFound(f"{whose} serves files and batches; `gateway.jobs` in a member's spec lets it")
        return found[0]


def is_of_jobs(path: str) -> bool:
    return path.startswith(_OF_JOBS) and path.removeprefix("/v1/").partition("/")[0] in ("files", "batches")


def own_app(
    config: FleetConfig,
    members: Members,
    metrics: GatewayMetrics,
    write_line: Callable[[str], object],
    overview: Overview,
    draining: Callable[[], bool],
) -> Flask:
    """Returns the application for requests that no member answers: list of models, page, state of the fleet, and errors."""
    app = base_app(config, metrics, write_line)
    began = int(time.time())

    def document(model: str) -> dict[str, Any]:
        return {"id": model, "object": "model", "created": began, "owned_by": "lamina"}

    def opened() -> list[str]:
        members.clients.identify(request)
        return members.opened_by(bearer_token(request.headers.get("Authorization", "")))

    def models() -> Response:
        return json_response({"object": "list", "data": [document(model) for model in sorted(opened())]})

    def one_model(model: str) -> Response:
        known = opened()
        return json_response(document(model)) if model in known else json_response(_unknown(model, known), 404)

    def refuse(**_: str) -> Response:
        error = request.environ.get(_ERROR)
        if isinstance(error, Problem):
            raise error
        document = _unknown(str(error), opened())
        if not request.path.startswith("/v1/"):
            raise NotFound(document["error"]["message"])
        return json_response(document, 404)

    def subscribe() -> tuple[str, Callable[[], FleetState]]:
        secret = bearer_token(request.headers.get("Authorization", ""))
        return members.clients.identify(request), lambda: overview.state(config.fleet, members.opened_by(secret))

    app.get(FLEET_EVENTS)(StateEventsAPI(FLEET_EVENTS, subscribe, draining).events)
    routes = Blueprint("openai", __name__, url_prefix="/v1")
    routes.get("/models")(models)
    routes.get("/models/<path:model>")(one_model)
    routes.get(PIPELINE_EVENTS.removeprefix("/v1"), endpoint="events")(refuse)
    for path in POST_PATHS:
        if path.startswith("/v1/"):
            routes.post(path.removeprefix("/v1"), endpoint=path.replace("/", "-"))(refuse)
        else:
            app.post(path, endpoint=f"post{path}")(refuse)
    for path in _OF_JOBS:
        for rest in ("", "/<path:rest>"):
            rule = path.removeprefix("/v1") + rest
            routes.add_url_rule(rule, f"refuse{path}{rest}".replace("/", "-"), refuse, methods=["GET", "POST", "DELETE"])
    add_error_handlers(routes)
    app.register_blueprint(routes)
    app.get("/health", endpoint="health")(lambda: Response(status=200))
    app.get("/version", endpoint="version")(lambda: json_response({"version": VERSION}))
    if config.page == "on":
        register_page(app, of_fleet=True)
    return app


def fleet_admission(config: FleetConfig, members: Members) -> "Callable[[WSGIEnvironment], int | None]":
    """Returns a function that checks a request's head before its body is read, like `gateway_admission`.

    A POST needs an API key of any member.
    """
    sites = Sites(config, is_open=not members.clients.are_known)

    def admit(environ: "WSGIEnvironment") -> int | None:
        sites.check(environ)
        if environ["REQUEST_METHOD"] != "POST":
            return 0
        if not is_of_jobs(environ["PATH_INFO"]) and environ["PATH_INFO"] not in POST_PATHS:
            return None
        return admit_body(environ, members.clients)

    return admit


def _unknown(model: str, known: Iterable[str]) -> dict[str, Any]:
    return unknown_model(model, ", ".join(sorted(known)) or "no model yet")
