"""A stand-in function for tests of the platform; paths and environment tell it what to do.

    python -m tests.support.knative.echo_app

PORT as in any function. CRASH=1: ends at once with status 1. NEVER_READY=1: its readiness probe always fails.
FAILING_PROBES=3: its first 3 readiness probes fail.
"""

import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

MOST_SECONDS = 60


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == "/readyz":
            probes.append(None)
            unready = os.environ.get("NEVER_READY") or len(probes) <= int(os.environ.get("FAILING_PROBES", "0"))
            self.answer(503 if unready else 200, b"{}")
        elif parts.path == "/hold":
            self.hold(Path(parse_qs(parts.query)["until"][0]))
        elif parts.path == "/environment":
            self.answer(200, os.environ.get(parts.query, "").encode())
        elif parts.path == "/header":
            self.answer(200, (self.headers.get(parts.query) or "").encode())
        elif parts.path == "/pid":
            self.answer(200, str(os.getpid()).encode())
        elif parts.path == "/crash":
            os._exit(7)
        elif parts.path == "/eat":
            memory.append(bytearray(int(parts.query)))
            self.answer(200, b"eaten")
        else:
            self.answer(404, b"no such path")

    def do_POST(self) -> None:
        """Answers every chunk of the request before it reads the next."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.write_chunk(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.write_chunk(self.rfile.read(int(self.headers["Content-Length"])))
        self.wfile.write(b"0\r\n\r\n")

    def hold(self, until: Path) -> None:
        """Answers once the file exists."""
        deadline = time.monotonic() + MOST_SECONDS
        while not until.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.answer(200, str(os.getpid()).encode())

    def write_chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


memory: list[bytearray] = []
probes: list[None] = []


def main() -> None:
    if os.environ.get("CRASH"):
        sys.exit("told to crash")
    server = ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler)
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
