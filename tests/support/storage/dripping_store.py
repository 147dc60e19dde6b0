"""A server that never stalls and never ends: it takes what it is sent byte by byte, or answers so."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Literal

from storage.store.settings import StoreSettings

DRIP_SECONDS = 0.05  # between two bytes
_RECEIVE_BYTES = 4096

Drips = Literal["request", "head", "body"]


@contextmanager
def dripping_store(settings: StoreSettings, drips: Drips, length: int) -> Iterator[StoreSettings]:
    """Like the store of `settings`. length: of what it says that it will send."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        server.settimeout(0.1)

        def serve() -> None:
            while not over.is_set():
                with suppress(TimeoutError):
                    connection, _ = server.accept()
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                seen = b""
                while b"\r\n\r\n" not in seen:
                    seen += connection.recv(65536 if drips != "request" else 1024)
                while drips == "request" and not over.wait(DRIP_SECONDS):
                    connection.recv(1)
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nContent-Range: bytes 0-{length - 1}/{length}\r\n"
                connection.sendall(head.encode())
                connection.sendall(b"X-Long: " if drips == "head" else b"\r\n")
                while not over.wait(DRIP_SECONDS):
                    connection.sendall(b"x")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield replace(settings, endpoint_url=f"http://127.0.0.1:{server.getsockname()[1]}")
        finally:
            over.set()
            thread.join()
