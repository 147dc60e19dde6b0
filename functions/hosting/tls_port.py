"""The port on which a stage with its own certificate accepts TLS connections from other pods of the pipeline.

Knative's queue-proxy asks for no client certificate. So a stage whose pipeline has certificates listens itself, and passes the
bytes on to the queue-proxy of its pod, on loopback. There the requests are counted and limited as all others.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
from typing import Final

from eventing.http.pod_tls import PodTLS

_log = logging.getLogger(__name__)

_HANDSHAKE_SECONDS: Final = 10.0
_LINGER_SECONDS: Final = 2.0  # a refused client's bytes are read so long: closing earlier could destroy the refusal
_MAX_CONNECTIONS: Final = 512
_BUFFER_BYTES: Final = 2**20
_READ_BYTES: Final = 2**18
_REFUSAL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
)


def serve_tls(listener: socket.socket, tls: PodTLS, to_port: int) -> None:
    """Accepts TLS connections from the pipeline's pods, and forwards their bytes to a port of this machine and back.

    Serves in a daemon thread until the process ends. `listener` must be listening. `to_port` is the port of the pod's
    queue-proxy.
    """
    connections: set[_Inbound] = set()

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Inbound(tls, to_port, connections), sock=listener)
        await server.serve_forever()

    threading.Thread(target=lambda: asyncio.run(serve()), name="tls-port", daemon=True).start()


class _Side(asyncio.Protocol):
    """One side of a forwarded connection, such as the one to queue-proxy.

    It stops reading while the other side's buffer is full.
    """

    transport: asyncio.Transport | None = None

    def __init__(self, other: "_Side | None" = None) -> None:
        self.other = other

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(_BUFFER_BYTES)

    def data_received(self, data: bytes) -> None:
        assert self.other is not None
        self.other.send(data)

    def send(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()  # after what was written


class _Inbound(_Side):
    """The side with TLS.

    It uses MemoryBIO, because asyncio's own TLS sends no alert to a client whose certificate it refuses.
    """

    def __init__(self, tls: PodTLS, to_port: int, connections: "set[_Inbound]") -> None:
        super().__init__()
        self._pod_tls = tls
        self._to_port = to_port
        self._connections = connections
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = tls.server().wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._established = self._refused = False
        self._opening: asyncio.Task[None] | None = None
        self._peer = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if len(self._connections) >= _MAX_CONNECTIONS:
            transport.close()
            return
        self._connections.add(self)
        self._peer = str(transport.get_extra_info("peername")[0])
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        asyncio.get_running_loop().call_later(_HANDSHAKE_SECONDS, self._expire)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._incoming.write(data)
        try:
            if not self._established:
                self._tls.do_handshake()
                self._established = True
                self._admit()
            if self.other is not None:
                self._carry()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self._refuse(str(error))
        self._flush()

    def send(self, data: bytes) -> None:
        with contextlib.suppress(ssl.SSLError):  # the client has closed
            self._tls.write(data)
            self._flush()

    def _admit(self) -> None:
        if self._pod_tls.admits(self._tls.getpeercert()):
            assert self.transport is not None
            self.transport.pause_reading()
            self._opening = asyncio.get_running_loop().create_task(self._open())
        else:
            self._answer(f"the certificate of the client does not have the name {self._pod_tls.name}")

    async def _open(self) -> None:
        try:
            _, self.other = await asyncio.get_running_loop().create_connection(lambda: _Side(self), "127.0.0.1", self._to_port)
        except OSError as error:
            self._answer(f"queue-proxy does not answer on port {self._to_port}: {error}")
            return
        if self.transport is not None:
            self.transport.resume_reading()
            self.data_received(b"")  # what came with the end of the handshake
        elif self.other.transport is not None:
            self.other.transport.close()

    def _carry(self) -> None:
        assert self.other is not None
        while data := self._tls.read(_READ_BYTES):
            self.other.send(data)
        with contextlib.suppress(ssl.SSLError):  # the client has closed, by a close_notify that is answered
            self._tls.unwrap()
        self._flush()
        if self.transport is not None:
            self.transport.close()

    def _answer(self, text: str) -> None:
        self.send(_REFUSAL % (len(text), text.encode()))
        self._refuse(text)

    def _refuse(self, reason: str) -> None:
        _log.warning("a connection from %s was refused: %s", self._peer, reason)
        self._refused = True
        self._flush()
        if self.transport is not None:
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.transport.resume_reading()
            asyncio.get_running_loop().call_later(_LINGER_SECONDS, self.transport.close)

    def _expire(self) -> None:
        if not self._established and self.transport is not None:
            self.transport.close()

    def _flush(self) -> None:
        if self._outgoing.pending and self.transport is not None and not self.transport.is_closing():
            self.transport.write(self._outgoing.read())
