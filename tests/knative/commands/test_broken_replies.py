"""Processes that end in the middle of a reply: `http.client` reports that by an exception that is no OSError."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from knative.cluster.cost import NotCounted, usage_from_prometheus
from knative.commands import status
from knative.commands.local_pods import objective_line, read_metrics, samples_by_model, tokens_per_second
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
    assert read_metrics({"metrics_port": port}) is None


@pytest.mark.parametrize(("phase", "waiting"), [("ready", None), ("starting", 3)])
def test_load_is_unknown_if_a_ready_pod_does_not_answer(phase: str, waiting: int | None) -> None:
    """As for Knative's autoscaler. The metrics of a pod that starts are not served yet."""
    registry = CollectorRegistry()
    Gauge("lamina_gateway_waiting_sequences", "help", ["model"], registry=registry).labels("m").set(3)
    Gauge("lamina_gateway_objective_share", "help", registry=registry).set(0.5)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))  # and does not listen
            pods = [
                {"name": "a", "phase": "ready", "metrics_port": server.server_port},
                {"name": "b", "phase": phase, "metrics_port": silent.getsockname()[1]},
            ]
            assert tokens_per_second({"pods": pods}, 1.0, {"a": (0.0, 0.0)}) == (None if waiting is None else 0.0, waiting)
            by_model = samples_by_model(pods)
            assert (by_model is None) is (waiting is None)
            assert by_model is None or by_model["lamina_gateway_waiting_sequences"] == {"m": 3.0}
            assert ("b did not answer" in str(objective_line(pods))) is (waiting is None)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_status_names_the_platform_that_breaks_off(port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    running = SimpleNamespace(pid=7, admin_url=f"http://127.0.0.1:{port}")
    monkeypatch.setattr(status, "find_running", lambda _: running)
    with pytest.raises(StateError, match="process 7 runs, but does not answer"):
        status._local_status(tmp_path)


def test_a_prometheus_that_breaks_off_is_named(port: int) -> None:
    cluster = SimpleNamespace()
    with pytest.raises(NotCounted, match="does not answer as a Prometheus does"):
        usage_from_prometheus(cluster, "default", "chat", f"http://127.0.0.1:{port}", 3600.0, 1e9)  # type: ignore[arg-type]
