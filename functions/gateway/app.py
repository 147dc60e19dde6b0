"""The gateway's Flask application: the routes of all APIs, over one AnswerService."""

import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from flask import Blueprint, Flask, Request, Response, g, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from eventing.claim_check import ClaimCheck
from eventing.http.delivery import Sender
from eventing.problems import EventTooLarge, NotReady, Problem, Unauthorized
from functions.configuration.api_keys import Quota
from functions.configuration.config import ClientsConfig, GatewayConfig
from functions.gateway.answers.access_log import AccessLog
from functions.gateway.answers.adapters import ServedModels
from functions.gateway.answers.authentication import Clients, KeyRing
from functions.gateway.answers.client_limits import ClientLimits
from functions.gateway.answers.metrics import GatewayMetrics
from functions.gateway.answers.service import AnswerService
from functions.gateway.answers.sites import Sites, check_media_type
from functions.gateway.answers.vectors import VectorService
from functions.gateway.cloudevents.api import CloudEventsAPI
from functions.gateway.cloudevents.scoring import ScoreEntry
from functions.gateway.jobs.batches import Batches
from functions.gateway.jobs.batches_api import BatchesAPI
from functions.gateway.jobs.events import BatchEvents
from functions.gateway.jobs.files import MAX_FILE_BYTES, Files, JobObjects
from functions.gateway.jobs.files_api import UPLOAD_PATH, FilesAPI
from functions.gateway.jobs.hold import Hold
from functions.gateway.openai.api import OpenAIAPI
from functions.gateway.openai.embeddings import EmbeddingsAPI
from functions.gateway.openai.errors import add_error_handlers, refused
from functions.gateway.openai.tokens import TokensAPI
from functions.gateway.openapi.document import register_document
from functions.gateway.openapi.operations import operations
from functions.gateway.page.page import register_page
from functions.gateway.page.pipeline_state import PIPELINE_EVENTS, PipelineState, PipelineWatch
from functions.gateway.page.state_events import StateEventsAPI
from functions.hosting.requests import CLIENT_ID, STREAMED
from functions.hosting.web import add_problem_handlers
from storage.errors import StorageError
from storage.store.payload_store import PayloadStore

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_log: Final = logging.getLogger(__name__)

MAX_REQUEST_BYTES: Final = 2**23  # far more than the text of any model's context
_SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class _Gateway(Flask):
    """The Flask application. Counts each POST that an API refuses in `lamina_gateway_answers`, with its error as a label.

    An answer that has begun is not counted here: Answer.close counts it when it ends.
    """

    def __init__(self, metrics: GatewayMetrics) -> None:
        super().__init__("gateway", static_folder=None)
        self._metrics = metrics

    def handle_user_exception(self, e: Exception) -> Any:
        if not isinstance(e, Problem | HTTPException):
            _log.error("%s failed", g.get("request_id", "a request"))
        if request.method == "POST" and not g.get("answering", False):
            if isinstance(e, RequestEntityTooLarge):
                self._metrics.answers.labels(EventTooLarge.name).inc()
            elif not isinstance(e, HTTPException):  # those are paths and methods that no API has
                self._metrics.answers.labels(e.name if isinstance(e, Problem) else Problem.name).inc()
        return super().handle_user_exception(e)


def base_app(config: ClientsConfig, metrics: GatewayMetrics, write_line: Callable[[str], object]) -> Flask:
    """Returns an application without routes, with what all gateways need: error handlers, headers, the access log.

    `write_line` receives each line of the access log.
    """
    app = _Gateway(metrics)
    app.config["MAX_CONTENT_LENGTH"] = MAX_REQUEST_BYTES
    add_problem_handlers(app)
    app.after_request(_add_headers)
    if config.cors_origins is not None:
        app.after_request(partial(_add_cross_origin_headers, frozenset(config.cors_origins)))
    if config.access_log != "off":
        app.wsgi_app = AccessLog(app.wsgi_app, write_line, with_prompts=config.access_log == "prompts")  # type: ignore[method-assign]
    return app


@dataclass(frozen=True, slots=True)
class Jobs:
    """Files and batches of clients, and the CloudEvents that begin batches and report their ends."""

    batches: Batches
    events: BatchEvents
    hold: Hold


def create_app(
    config: GatewayConfig,
    service: Callable[[], AnswerService],
    metrics: GatewayMetrics,
    keys: KeyRing,
    write_line: Callable[[str], object] = lambda line: print(line, file=sys.stderr, flush=True),
    watch: PipelineWatch | None = None,
    jobs: Jobs | None = None,
    models: ServedModels | None = None,
    batches_changed: Callable[[], object] = lambda: None,
) -> Flask:
    """Returns the application with the routes of all APIs. It can answer before the tokenizer is loaded.

    `service` returns the AnswerService, or raises NotReady before the tokenizer is loaded. `write_line` receives each line of
    the access log. `watch` answers `GET /v1/pipeline/events`; if it is None, that path is not served. If `jobs` is None, files
    and batches are not served; if `models` is None, adapters are not. `batches_changed` is called when a batch was created or
    cancelled.
    """
    app = base_app(config, metrics, write_line)
    clients = Clients(None if keys.is_open else keys.find, config.proxies)
    source = f"/pipelines/{config.pipeline}/gateway"
    claims = ClaimCheck(PayloadStore(config.store), config.store.bucket)
    scores = None
    if config.scores == "on":
        scores = ScoreEntry(service, claims, pipeline=config.pipeline, source=source, token=config.pipeline_token)
    events = None if jobs is None else jobs.events
    app.post("/")(CloudEventsAPI(service, clients, claims, scores, source, config, events, batches_changed).receive)
    TokensAPI(service, clients).register(app)
    if watch is not None:

        def subscribe() -> tuple[str, Callable[[], PipelineState]]:
            client_id = clients.identify(request)
            return client_id, partial(watch.state, client_id)

        app.get(PIPELINE_EVENTS)(StateEventsAPI(PIPELINE_EVENTS, subscribe, watch.draining).events)
    if config.page == "on":
        register_page(app)
    described = list(operations(with_page=config.page == "on", with_jobs=jobs is not None))
    register_document(app, described, config.model, with_keys=not keys.is_open)
    OpenAIAPI(service, clients, config, models or ServedModels(config.model, None)).register(app)
    EmbeddingsAPI(VectorService(service), clients, config).register(app)
    if jobs is not None:
        routes = Blueprint("jobs", __name__, url_prefix="/v1")
        FilesAPI(jobs.batches, clients).register(routes)
        BatchesAPI(jobs.batches, clients, batches_changed).register(routes)
        hold = jobs.hold.hold
        routes.get("/batches/hold", endpoint="hold")(lambda: Response("held" if hold() else "", content_type="text/plain"))
        add_error_handlers(routes)
        routes.errorhandler(StorageError)(lambda error: refused(NotReady(f"the store of files and batches failed: {error}")))
        app.register_blueprint(routes)
    return app


def _add_headers(response: Response) -> Response:
    for name, value in _SECURITY_HEADERS.items():
        response.headers.setdefault(name, value)
    if "request_id" in g:
        response.headers["X-Request-Id"] = g.request_id
    return response


def _add_cross_origin_headers(origins: frozenset[str], response: Response) -> Response:
    """Adds the headers with which browsers let pages of other sites send requests (Fetch Standard, section 3.2).

    `origins` are the allowed sites, as browsers send them in `Origin`; `*` allows all. Cookies and other credentials of the
    browser are never allowed: a page sets the header with the API key itself.
    """
    origin = request.headers.get("Origin", "")
    response.vary.add("Origin")
    if not origin or not origins & {origin, "*"}:
        return response
    response.headers["Access-Control-Allow-Origin"] = "*" if "*" in origins else origin
    response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
    if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
        response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE, OPTIONS"
        if requested := request.headers.get("Access-Control-Request-Headers"):
            response.headers["Access-Control-Allow-Headers"] = requested
        response.headers["Access-Control-Max-Age"] = "600"
    return response


def client_limits(config: GatewayConfig, keys: KeyRing) -> ClientLimits:
    default = Quota(
        config.client_requests_per_minute,
        config.client_tokens_per_minute,
        config.client_concurrent,
        config.client_max_tokens,
        tokens_per_day=config.client_tokens_per_day,
        tokens_per_month=config.client_tokens_per_month,
    )
    return ClientLimits(default, keys.quota, config.limits_store, config.model)


def gateway_admission(config: GatewayConfig, keys: KeyRing, app: Flask) -> "Callable[[WSGIEnvironment], int | None]":
    """Returns a function with which the server checks a request's head before it reads the body.

    The function takes the WSGI environ and sets CLIENT_ID in it. It returns the most bytes that the body may have, which is 0
    unless the method is POST. It returns None if `app` does not serve the path with this method. It raises Unauthorized if the
    gateway has API keys and a POST has no valid one, UnknownHost or CrossSite if a page of another site may have sent the
    request, and UnsupportedMediaType if the body is not declared as JSON.
    """
    clients, sites = Clients(None if keys.is_open else keys.find, config.proxies), Sites(config, is_open=keys.is_open)
    routes = app.url_map.bind("")  # no route depends on the host

    def admit(environ: "WSGIEnvironment") -> int | None:
        sites.check(environ)
        try:
            routes.match(environ["PATH_INFO"], environ["REQUEST_METHOD"])
        except HTTPException:
            return None
        if environ["REQUEST_METHOD"] == "POST":
            return admit_body(environ, clients)
        with suppress(Unauthorized):  # some paths without a body need no key
            environ[CLIENT_ID] = clients.identify(Request(environ, populate_request=False))
        return 0

    return admit


def admit_body(environ: "WSGIEnvironment", clients: Clients) -> int:
    """Returns how many bytes the body of a POST may have.

    Sets CLIENT_ID, and STREAMED if the application reads the body as it arrives. Raises Unauthorized, and UnsupportedMediaType
    if the body is not declared as JSON.
    """
    environ[CLIENT_ID] = clients.identify(Request(environ, populate_request=False))  # else the environ would hold itself
    if environ["PATH_INFO"] == UPLOAD_PATH:
        environ[STREAMED] = True
        return MAX_FILE_BYTES + MAX_REQUEST_BYTES  # with the other fields of the form
    check_media_type(environ)
    return MAX_REQUEST_BYTES


def configured_batches(config: GatewayConfig) -> Batches | None:
    """Returns the batches and their files in the configured store; None if no store is configured for them."""
    if config.jobs_store is None:
        return None
    bucket, prefix = config.jobs_store
    # By model: gateways of other models would answer that they do not serve this one.
    objects = JobObjects(PayloadStore(replace(config.store, bucket=bucket)), f"{prefix}/{config.model}")
    return Batches(objects, Files(objects, config.jobs_retention_seconds))


def configured_jobs(config: GatewayConfig) -> Jobs | None:
    """Returns files, batches and their events; None if no store is configured for them."""
    batches = configured_batches(config)
    if batches is None:
        return None
    claims = ClaimCheck(PayloadStore(config.store), config.store.bucket)
    sender = Sender()
    events = BatchEvents(batches, claims, sender, f"/pipelines/{config.pipeline}/gateway", config.sink)
    return Jobs(batches, events, Hold(sender, config.own_url))
