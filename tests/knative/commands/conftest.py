"""A tiny model in a folder, a run of it that ends with its test, and a stand-in for the Kubernetes API."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.knative.deployments import secret
from tests.support.knative.kubernetes_api import KubernetesApi
from tests.support.knative.run_command import Run
from tests.support.storage.published import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-model"
    save_checkpoint(folder)
    return folder


@pytest.fixture
def running(checkpoint: Path, tmp_path: Path) -> Iterator[Run]:
    run = Run(checkpoint, tmp_path / "state")
    try:
        yield run
    finally:
        run.end()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[KubernetesApi]:
    """Its kubeconfig is in tmp_path."""
    server = KubernetesApi()
    server.put(secret("lamina-store", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    (tmp_path / "kubeconfig").write_text(server.kubeconfig())
    yield server
    server.close()
