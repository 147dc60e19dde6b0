"""Sending events over HTTP, in one attempt each: whoever sends knows better what to do about a failure.

The gateway answers one with another route and a replay. A redirect is never followed, and a proxy from the environment never
used.
"""

import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from eventing.http.connections import Connection, ConnectionPool, NoFreeConnection, Origin
from eventing.http.exchange import BadReply, ReplyTooLarge, remaining, request_head
from eventing.problems import PROBLEM_CONTENT_TYPE, problem_from_document
from eventing.wire.cloud_event import Buffer

USER_AGENT: Final = "lamina"
_EXCERPT_LENGTH: Final = 200
_NEVER_SENT: Final = frozenset(
    {"k-proxy-request", "k-kubelet-probe", "host", "content-length", "transfer-encoding", "user-agent"}
)
"""Knative's own headers make a request invisible to the autoscaler; the others are this module's to set."""


class DeliveryError(Exception):
    """Base: no answer of Lamina's came. The message names the URL."""


class Unreachable(DeliveryError):
    """No connection (refused, no route, unknown name, TLS, none free): nothing was delivered."""


class ConnectionBroken(DeliveryError):
    """The connection broke before the whole reply was there: the event may have been worked on or not."""


class DeliveryTimeout(DeliveryError):
    """The time was over before the whole reply was there: the event may have been worked on or not."""


class InfrastructureError(DeliveryError):
    """A reply that is neither 2xx nor a problem document of Lamina's: a proxy, activator or server spoke."""

    def __init__(self, status: int, url: str, excerpt: str) -> None:
        super().__init__(f"{url} answered {status}: {excerpt}")
        self.status = status
        self.url = url
        self.excerpt = excerpt


@dataclass(frozen=True, slots=True)
class Reply:
    """A 2xx reply. `headers` in lower case; `body` is writable memory of its own, so tensors can lie in it."""

    status: int
    headers: Mapping[str, str]
    body: memoryview


class Sender:
    """Thread-safe. Connections are kept and used again; close() ends them."""

    def __init__(
        self,
        *,
        connect_timeout_seconds: float = 5.0,
        max_connections_per_host: int = 64,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls` None: the system's trust store, host names checked."""
        self._connect_timeout_seconds = connect_timeout_seconds
        self._pool = ConnectionPool(max_connections_per_host, tls)
        self._closed = False

    def send(self, url: str, headers: Mapping[str, str], buffers: Sequence[Buffer], timeout_seconds: float) -> Reply:
        """POSTs `buffers` one after the other as one body, within `timeout_seconds` from now until the reply's last byte.

        Raises a Problem where Lamina refused, InfrastructureError where something between did, else another DeliveryError.
        """
        head = _request_head(url, headers, sum(memoryview(buffer).nbytes for buffer in buffers))
        return self._accepted(url, head, buffers, timeout_seconds)

    def get(self, url: str, headers: Mapping[str, str], timeout_seconds: float) -> Reply:
        """Likewise, without a body."""
        return self._accepted(url, _request_head(url, headers, None), (), timeout_seconds)

    def _accepted(self, url: str, head: bytes, buffers: Sequence[Buffer], timeout_seconds: float) -> Reply:
        reply = self._exchange(url, head, buffers, time.monotonic() + timeout_seconds)
        if 200 <= reply.status < 300:
            return reply
        raise _refusal(url, reply)

    def close(self) -> None:
        self._closed = True
        self._pool.close()

    def __enter__(self) -> "Sender":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, url: str, head: bytes, buffers: Sequence[Buffer], deadline: float) -> Reply:
        if self._closed:
            raise Unreachable(f"{url}: the sender is closed")
        origin = Origin.of(url)
        try:
            with self._pool.connection(origin, deadline - time.monotonic()) as connection:
                self._connect(connection, url, deadline)
                reply = connection.exchange(head, buffers, deadline)
                return Reply(reply.status, reply.headers, memoryview(reply.body))
        except NoFreeConnection as error:
            raise Unreachable(f"{url}: {error}") from error
        except TimeoutError as error:
            raise DeliveryTimeout(f"{url}: no complete reply in time") from error
        except ReplyTooLarge as error:
            raise InfrastructureError(error.status, url, str(error)) from error
        except (OSError, BadReply) as error:
            raise ConnectionBroken(f"{url}: the connection broke: {str(error) or type(error).__name__}") from error

    def _connect(self, connection: Connection, url: str, deadline: float) -> None:
        if connection.sock is not None:
            return
        timeout = min(self._connect_timeout_seconds, remaining(deadline))
        try:
            connection.connect(timeout)
        except OSError as error:
            raise Unreachable(f"{url}: no connection: {error}") from error


def _request_head(url: str, headers: Mapping[str, str], body_bytes: int | None) -> bytes:
    """body_bytes: None for a GET."""
    parts = urlsplit(url)
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    sent = {name: value for name, value in headers.items() if name.lower() not in _NEVER_SENT}
    own = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT}
    if body_bytes is not None:
        own["Content-Length"] = str(body_bytes)
    return request_head(parts.netloc.rpartition("@")[2], target, own | sent, "GET" if body_bytes is None else "POST")


def _refusal(url: str, reply: Reply) -> Exception:
    if reply.headers.get("content-type", "").startswith(PROBLEM_CONTENT_TYPE):
        problem = problem_from_document(bytes(reply.body))
        if problem is not None:
            problem.add_note(f"answered by {url}")
            return problem
    excerpt = " ".join(bytes(reply.body[:2000]).decode("utf-8", "replace").split())[:_EXCERPT_LENGTH]
    return InfrastructureError(reply.status, url, excerpt or "(no text)")
