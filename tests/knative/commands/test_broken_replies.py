"""Processes that end in the middle of a reply: `http.client` reports that by an exception that is no OSError."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from knative.cluster.cost import NotCounted, usage_from_prometheus
from knative.commands import status
from knative.commands.local_pods import read_metrics
from knative.commands.state_folder import StateError


@pytest.fixture(
    params=[b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nlamina_x 1\n", b"HTTP/9 gone\r\n\r\n"], ids=["body", "head"]
)
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of a server that sends this to one client and ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reply() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(request.param)

        thread = threading.Thread(target=reply)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def test_a_pod_that_ends_while_its_metrics_are_read_has_none(port: int) -> None:
    assert read_metrics({"metrics_port": port}) == {}


def test_status_names_the_platform_that_breaks_off(port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    running = SimpleNamespace(pid=7, admin_url=f"http://127.0.0.1:{port}")
    monkeypatch.setattr(status, "find_running", lambda _: running)
    with pytest.raises(StateError, match="process 7 runs, but does not answer"):
        status._local_status(tmp_path)


def test_a_prometheus_that_breaks_off_is_named(port: int) -> None:
    cluster = SimpleNamespace()
    with pytest.raises(NotCounted, match="does not answer as a Prometheus does"):
        usage_from_prometheus(cluster, "default", "chat", f"http://127.0.0.1:{port}", 3600.0, 1e9)  # type: ignore[arg-type]
