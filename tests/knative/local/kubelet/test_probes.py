"""How often a readiness probe runs, and which probes are refused."""

import time
from pathlib import Path
from typing import Any

import pytest

from knative.local.errors import UnsupportedManifest
from knative.local.kubelet.probes import Probe, read_probe, readiness_probe
from tests.support.knative.platform import client, echo_service, fetch, running_platform


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing_probes", "probe", "at_least"),
    [
        pytest.param(30, {}, 30 * 0.05, id="without a period every 50 ms"),
        pytest.param(2, {"periodSeconds": 1}, 2, id="with a period once a period"),
        pytest.param(0, {"periodSeconds": 1, "successThreshold": 3}, 2, id="as often in a row as the success threshold"),
    ],
)
async def test_a_readiness_probe_is_repeated(
    tmp_path: Path, failing_probes: int, probe: dict[str, Any], at_least: float
) -> None:
    """at_least: seconds from the first request, which starts a pod, to its answer."""
    container = {"readinessProbe": {"httpGet": {"path": "/readyz"}, **probe}}
    manifest = echo_service(environment={"FAILING_PROBES": str(failing_probes)}, container=container)
    async with running_platform(tmp_path, manifest) as platform, client() as session:
        began = time.monotonic()
        assert (await fetch(session, platform.url("echo") + "/pid"))[0] == 200
        assert at_least <= time.monotonic() - began < 28, "30 probes, and not one a second"


def test_a_container_without_a_probe_is_probed_by_connection_every_50_ms() -> None:
    probe = readiness_probe({"image": "app"})
    assert (probe.path, probe.until_ready.period_seconds, probe.until_ready.timeout_seconds) == (None, 0.05, 0.1)
    assert read_probe({"image": "app"}, "livenessProbe") is None


def test_a_probe_with_a_period_is_not_aggressive() -> None:
    probe = readiness_probe({"readinessProbe": {"httpGet": {"path": "/r"}, "periodSeconds": 3, "timeoutSeconds": 2}})
    assert probe.until_ready == probe == Probe("/r", period_seconds=3, timeout_seconds=2)


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ({"grpc": {"port": 8080}}, "readinessProbe.grpc: only httpGet and tcpSocket are run on one machine"),
        ({"httpGet": {"port": 9000}}, "readinessProbe.httpGet.port: 9000 is not the container's own port"),
        ({"httpGet": {"httpHeaders": [{"name": "a", "value": "b"}]}}, "readinessProbe.httpGet.httpHeaders: "),
        ({"httpGet": {"scheme": "HTTPS"}}, "readinessProbe.httpGet.scheme: "),
    ],
)
def test_unsupported_probes_are_refused(probe: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedManifest, match=message):
        readiness_probe({"ports": [{"containerPort": 8080}], "readinessProbe": probe})


def test_a_probe_may_name_the_containers_own_port() -> None:
    ports = [{"name": "http1", "containerPort": 8080}]
    for port in (8080, "http1"):
        assert readiness_probe({"ports": ports, "readinessProbe": {"tcpSocket": {"port": port}}}).path is None
