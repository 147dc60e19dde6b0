"""The gateway over HTTP: two doors, one core behind both."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from flask import Flask, Request

from eventing.claim_check import ClaimCheck
from functions.configuration.config import GatewayConfig
from functions.gateway.doors.answers import Answers
from functions.gateway.doors.clients import Clients
from functions.gateway.doors.events import EventDoor
from functions.gateway.doors.openai import OpenAIDoor
from functions.gateway.doors.scoring import ScoreEntry
from functions.hosting.web import add_problem_handlers
from storage.store.payload_store import PayloadStore

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

MAX_REQUEST_BYTES: Final = 2**23
"""Far beyond any context."""


def create_app(config: GatewayConfig, answers: Callable[[], Answers]) -> Flask:
    """`answers` raises NotReady until there is one."""
    app = Flask("gateway", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_REQUEST_BYTES
    add_problem_handlers(app)
    clients = Clients(config.api_keys or ())
    source = f"/pipelines/{config.pipeline}/gateway"
    claims = ClaimCheck(PayloadStore(config.store), config.store.bucket)
    scores = ScoreEntry(lambda: answers().text, claims, pipeline=config.pipeline, source=source, token=config.pipeline_token)
    EventDoor(answers, clients, claims, scores, source, config.request_timeout_seconds).register(app)
    OpenAIDoor(answers, clients, config.model, config.pipeline, config.request_timeout_seconds).register(app)
    return app


def gateway_admission(config: GatewayConfig) -> "Callable[[WSGIEnvironment], int]":
    """How large a body may be, by its head alone. Raises Unauthorized: who has no key sends none."""
    clients = Clients(config.api_keys or ())

    def admit(environ: "WSGIEnvironment") -> int:
        if environ["REQUEST_METHOD"] != "POST":
            return 0
        clients.identify(Request(environ))
        return MAX_REQUEST_BYTES

    return admit
