"""The gateway over HTTP: two doors, one core behind both."""

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from flask import Flask, Request, Response, g, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from eventing.claim_check import ClaimCheck
from eventing.problems import EventTooLarge, Problem
from functions.configuration.api_keys import Allowance
from functions.configuration.config import GatewayConfig
from functions.gateway.answers.access_log import AccessLog
from functions.gateway.answers.authentication import KeyRing
from functions.gateway.answers.client_limits import ClientLimits
from functions.gateway.answers.clients import Clients
from functions.gateway.answers.cors import CrossOrigin
from functions.gateway.answers.metrics import GatewayMetrics
from functions.gateway.answers.service import AnswerService
from functions.gateway.cloudevents.api import CloudEventsAPI
from functions.gateway.cloudevents.scoring import ScoreEntry
from functions.gateway.openai.api import OpenAIAPI
from functions.gateway.openai.tokens import TokensAPI
from functions.gateway.openapi.document import OpenAPIDocument
from functions.gateway.openapi.operations import operations
from functions.gateway.page.page import Page
from functions.gateway.page.pipeline_events import PipelineEventsAPI
from functions.gateway.page.pipeline_watch import PipelineWatch, StageName, Watched
from functions.gateway.stages.endpoints import service_name
from functions.hosting.web import add_problem_handlers
from storage.store.payload_store import PayloadStore

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_log: Final = logging.getLogger(__name__)

MAX_REQUEST_BYTES: Final = 2**23
"""Far beyond any context."""
_SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class _Counting(Flask):
    """Counts what is asked and refused by its outcome, as an answer counts itself once it has begun."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        super().__init__("gateway", static_folder=None)
        self._metrics = metrics

    def handle_user_exception(self, e: Exception) -> Any:
        if not isinstance(e, Problem | HTTPException):
            _log.error("%s failed", g.get("request_id", "a request"))
        if request.method == "POST" and not g.get("answering", False):
            outcome = _outcome(e)
            if outcome is not None:
                self._metrics.answers.labels(outcome).inc()
        return super().handle_user_exception(e)


def _outcome(error: Exception) -> str | None:
    """None: nothing was asked that this gateway could answer."""
    if isinstance(error, RequestEntityTooLarge):
        return EventTooLarge.name
    if isinstance(error, HTTPException):
        return None
    return error.name if isinstance(error, Problem) else Problem.name


def create_app(
    config: GatewayConfig,
    answers: Callable[[], AnswerService],
    metrics: GatewayMetrics,
    keys: KeyRing,
    write_line: Callable[[str], object] = lambda line: print(line, file=sys.stderr, flush=True),
    watched: Watched | None = None,
) -> Flask:
    """`answers` raises NotReady until there is one. write_line: of the access log. watched: None where nothing can be."""
    app = _Counting(metrics)
    app.config["MAX_CONTENT_LENGTH"] = MAX_REQUEST_BYTES
    add_problem_handlers(app)
    clients = Clients(keys, config.proxies)
    source = f"/pipelines/{config.pipeline}/gateway"
    claims = ClaimCheck(PayloadStore(config.store), config.store.bucket)
    scores = ScoreEntry(lambda: answers().text, claims, pipeline=config.pipeline, source=source, token=config.pipeline_token)
    entry = scores if config.scores == "on" else None
    app.after_request(_closed)
    if config.cors_origins is not None:
        CrossOrigin(config.cors_origins).register(app)
    if config.access_log != "off":
        app.wsgi_app = AccessLog(app.wsgi_app, write_line, with_prompts=config.access_log == "prompts")  # type: ignore[method-assign]
    CloudEventsAPI(answers, clients, claims, entry, source, config.request_timeout_seconds).register(app)
    TokensAPI(answers, clients).register(app)
    if watched is not None:
        PipelineEventsAPI(PipelineWatch(watched), clients).register(app)
    if config.page == "on":
        Page().register(app)
    described = list(operations(with_page=config.page == "on"))
    OpenAPIDocument(described, config.model, with_keys=not keys.is_open).register(app)
    OpenAIAPI(answers, clients, config.model, config.pipeline, config.request_timeout_seconds).register(app)
    return app


def _closed(response: Response) -> Response:
    """What a browser makes of a reply: nothing."""
    for name, value in _SECURITY_HEADERS.items():
        response.headers.setdefault(name, value)
    if "request_id" in g:
        response.headers["X-Request-Id"] = g.request_id
    return response


def stage_names(config: GatewayConfig) -> tuple[StageName, ...]:
    """As the configuration names them."""
    services = config.stage_services or [service_name(url) for _, url in config.stages]
    targets = config.stage_targets or [0.0] * len(config.stages)
    named = zip(services, config.cut, targets, strict=True)
    return tuple(StageName(service, layers, target or None) for service, layers, target in named)


def key_ring(config: GatewayConfig) -> KeyRing:
    """Raises ConfigError where a file is not as it should be."""
    return KeyRing(config.api_keys, config.api_key_files or ())


def client_limits(config: GatewayConfig, keys: KeyRing) -> ClientLimits:
    of_all = Allowance(
        config.client_requests_per_minute,
        config.client_tokens_per_minute,
        config.client_concurrent,
        config.client_max_tokens,
    )
    return ClientLimits(of_all, keys.allowance, config.limits_store, config.model)


def gateway_admission(keys: KeyRing) -> "Callable[[WSGIEnvironment], int]":
    """How large a body may be, by its head alone. Raises Unauthorized: who has no key sends none."""
    clients = Clients(keys)

    def admit(environ: "WSGIEnvironment") -> int:
        if environ["REQUEST_METHOD"] != "POST":
            return 0
        clients.identify(Request(environ))
        return MAX_REQUEST_BYTES

    return admit
