"""Problem documents for requests that a stage does not serve and for events that failed, by Flask."""

from typing import Final, NoReturn

from flask import Flask, Response, request

from eventing.wire.kv_query import KV_PATH
from functions.hosting.web import add_problem_handlers
from functions.stage.serving.app import ERROR, EVENT_TYPE, MAX_EVENT_BYTES, StageMetrics


def refusing_app(metrics: StageMetrics) -> Flask:
    """Refuses every request: an event with the ERROR of its environment, and any other as not served."""
    app: Final = Flask("stage", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_EVENT_BYTES
    add_problem_handlers(app)

    @app.post("/")
    @app.get(KV_PATH)
    def raise_what_went_wrong() -> NoReturn:
        raise request.environ[ERROR]

    @app.after_request
    def count(response: Response) -> Response:
        if EVENT_TYPE in request.environ:
            metrics.events.labels(request.environ[EVENT_TYPE], str(response.status_code)).inc()
        return response

    return app
