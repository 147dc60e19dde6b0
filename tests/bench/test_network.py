"""The slow network of benchmarks: a process of relays that delay bytes, limit their rate, and end with the benchmark."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench.network import relayed
from knative.local.proxies.network import EmulatedNetwork

SENT = bytes(range(256)) * 4096


@contextmanager
def echo() -> Iterator[str]:
    """A server that sends every connection's bytes back."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer(connection: socket.socket) -> None:
            with connection:
                while data := connection.recv(2**16):
                    connection.sendall(data)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def exchanged(url: str) -> bytes:
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as client:
        threading.Thread(target=lambda: (client.sendall(SENT), client.shutdown(socket.SHUT_WR))).start()
        return b"".join(iter(lambda: client.recv(2**16), b""))


@pytest.mark.parametrize(
    ("network", "least_seconds"), [(EmulatedNetwork(0.05), 0.1), (EmulatedNetwork(bytes_per_second=4e6), 0.9 * len(SENT) / 4e6)]
)
def test_bytes_are_delayed_or_limited_and_arrive_in_order(network: EmulatedNetwork, least_seconds: float) -> None:
    with echo() as upstream, relayed([upstream], network) as (url,):
        began = time.perf_counter()
        assert exchanged(url) == SENT
        assert time.perf_counter() - began >= least_seconds  # never faster; how much slower is the machine's


@pytest.mark.slow
def test_each_relay_has_a_rate_of_its_own_and_all_end_with_the_benchmark() -> None:
    with echo() as upstream, relayed([upstream] * 3, EmulatedNetwork(bytes_per_second=1e6)) as urls:
        began = time.perf_counter()
        clients = [threading.Thread(target=exchanged, args=(url,)) for url in urls]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert time.perf_counter() - began < 0.9 * 3 * len(SENT) / 1e6
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(urls[0].rpartition(":")[2])), timeout=30)
