"""Probes and metrics for the platform, as plain WSGI. They work even if the function's application does not."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from functions.hosting.requests import MANAGEMENT

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment


@dataclass(frozen=True, slots=True)
class Management:
    """Answers `/healthz`, `/readyz` and `/metrics`.

    On the clients' port it answers only the two probes, without details. The platform probes that port, but strangers can reach
    it, too.
    """

    registry: CollectorRegistry
    sick: Callable[[], str | None]  # returns what is wrong with the process; None: nothing is
    ready: Callable[[], tuple[bool, Mapping[str, object]]]  # returns whether the function takes work, and details

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        status, body, content_type = self._answer(environ)
        start_response(f"{status.value} {status.phrase}", [("Content-Type", content_type), ("Content-Length", str(len(body)))])
        return [body]

    def _answer(self, environ: "WSGIEnvironment") -> tuple[HTTPStatus, bytes, str]:
        path, detailed = environ["PATH_INFO"], bool(environ.get(MANAGEMENT))
        document: dict[str, object]
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, b"GET only\n", "text/plain"
        if path == "/healthz":
            cause = self.sick()
            good, document = cause is None, {"alive": cause is None, **({"cause": cause} if detailed else {})}
        elif path == "/readyz":
            good, details = self.ready()
            document = {"ready": good, **(details if detailed else {})}
        elif path == "/metrics" and detailed:
            return HTTPStatus.OK, generate_latest(self.registry), CONTENT_TYPE_LATEST
        else:
            return HTTPStatus.NOT_FOUND, b"/healthz, /readyz and /metrics are here\n", "text/plain"
        return HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, msgspec.json.encode(document), "application/json"
