"""A stand-in for the Kubernetes API, and a deployer that talks to it over real HTTP."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from knative.cluster.client import Cluster
from knative.cluster.deployer import Deployer
from tests.support.knative.deployments import secret, sink
from tests.support.knative.kubernetes_api import EVENTING, KubernetesApi


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    server = KubernetesApi()
    server.put(secret("lamina-store", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    yield server
    server.close()


@pytest.fixture
def eventing(api: KubernetesApi) -> None:
    """Knative Eventing is installed, and the sinks exist."""
    api.kinds |= EVENTING
    for name in ("dead-letters", "answers"):
        api.put(sink(name))


@pytest.fixture
def cluster(api: KubernetesApi, tmp_path: Path) -> Cluster:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(api.kubeconfig())
    return Cluster.connect(str(kubeconfig))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def deployer(cluster: Cluster, said: list[str]) -> Deployer:
    return Deployer(cluster, "default", said.append, timeout_seconds=5)
