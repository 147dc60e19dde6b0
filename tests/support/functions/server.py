"""The HTTP server in its own process, with an application that can be held, and misbehaving clients."""

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Final

from tests.support.paths import ROOT

_SERVER: Final = """
import hashlib, json, sys, threading, time
import functions.hosting.answering
from eventing.problems import Problem
from functions.hosting.requests import CLIENT_GONE, CLIENT_ID, STREAMED
from functions.hosting.connection import ServerLimits
from functions.hosting.answering import Service
from functions.hosting.server import Server
given = json.loads(sys.argv[1])
functions.hosting.answering.NEXT_REQUEST_SECONDS = given["next_request_seconds"]
held = threading.Event()
gone = threading.Event()
def application(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/stream":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return stream()
    if path == "/megabyte":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return megabyte()
    if path == "/slow-stream":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return slow_stream()
    if path == "/hold":
        held.wait()
    if path == "/release":
        held.set()
    if path == "/until-gone":
        while not environ[CLIENT_GONE]():
            time.sleep(0.01)
        gone.set()
    if path == "/gone":
        gone.wait()
    body = threading.current_thread().name.encode()
    if path == "/echo":
        body = bytes(environ["wsgi.input"].read())
    if path == "/streamed" and "lamina.refused" not in environ:
        digest = hashlib.sha256()
        try:
            while piece := environ["wsgi.input"].read(2**16):
                digest.update(piece)
        except Problem as problem:
            start_response(f"{problem.status} Refused", [])
            return [str(problem).encode()]
        body = digest.hexdigest().encode()
    if "lamina.refused" in environ:
        start_response("503 Service Unavailable", [])
        return [type(environ["lamina.refused"]).__name__.encode()]
    if given["tells"]:
        host, body = environ.get("HTTP_HOST", "-"), environ["wsgi.input"].read().decode("latin-1")
        target = path + "?" * bool(environ["QUERY_STRING"]) + environ["QUERY_STRING"]
        body = " ".join([environ["REQUEST_METHOD"], target, host, body]).encode("latin-1")
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
def stream():
    try:
        while True:
            yield bytes(2**20)
    finally:
        gone.set()
def megabyte():
    try:
        for _ in range(16):
            yield bytes(2**16)
    except GeneratorExit:
        gone.set()
        raise
def slow_stream():
    for _ in range(10):
        time.sleep(0.05)
        yield b"."
def admit(environ):
    environ[CLIENT_ID] = environ.get("HTTP_CLIENT", "")
    environ[STREAMED] = environ["PATH_INFO"] == "/streamed"
    return None if environ["PATH_INFO"] == "/unread" else given["body_bytes"]
def management(environ, start_response):
    start_response("200 OK", [])
    return [b"management" if environ["lamina.management"] else b"probe"]
server = Server("127.0.0.1", 0, 0, ServerLimits(**given["limits"]))
print(server.port, server.management_port, flush=True)
service = Service(application, management, admit, given["threads"], given["request_bytes"])
sys.exit(server.run(service, lambda: None, lambda: None))
"""
ENOUGH: Final = 60.0  # seconds; far longer than anything here takes


@dataclass(frozen=True)
class Serving:
    process: "subprocess.Popen[str]"
    port: int
    management_port: int

    def get(self, path: str) -> bytes:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ENOUGH)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=ENOUGH)


@contextmanager
def serving(
    threads: int,
    next_request_seconds: float = 0.25,
    *,
    body_bytes: int = 2**20,
    request_bytes: int = 2**22,
    tells: bool = False,
    **limits: float,
) -> Iterator[Serving]:
    """tells: replies have what was read as their body: method, target, Host and body."""
    given = {
        "threads": threads,
        "next_request_seconds": next_request_seconds,
        "body_bytes": body_bytes,
        "request_bytes": request_bytes,
        "tells": tells,
        "limits": limits,
    }
    code = [sys.executable, "-c", _SERVER, json.dumps(given)]
    with subprocess.Popen(code, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            port, management_port = map(int, process.stdout.readline().split())
            yield Serving(process, port, management_port)
        finally:
            process.kill()


@contextmanager
def half_sent(server: Serving, count: int, begun: bytes) -> Iterator[list[socket.socket]]:
    """Connections that have each sent the begin of a request."""
    with ExitStack() as stack:
        opened = [stack.enter_context(server.connect()) for _ in range(count)]
        for sock in opened:
            sock.sendall(begun)
        yield opened


def reply(sock: socket.socket) -> bytes:
    """Everything until the server closes the connection, or resets it because it left bytes unread."""
    seen = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(2**16):
            seen += piece
    return seen
