"""A stand-in for the Kubernetes API of a cluster with Knative, and a deployer that talks to it over real HTTP."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.knative.kubernetes_api import EVENTING, KubernetesApi
from tests.support.knative.manifests import objects, resource, secret
from tests.support.knative.site import Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Its kubeconfig is in tmp_path."""
    api = KubernetesApi()
    api.put(secret("lamina-store", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    yield Site(api, tmp_path / "kubeconfig")
    api.close()


@pytest.fixture
def serving(site: Site) -> Site:
    """The pipeline of `objects()` is deployed."""
    site.deployer.deploy(objects())
    return site


@pytest.fixture
def api(site: Site) -> KubernetesApi:
    return site.api


@pytest.fixture
def eventing(api: KubernetesApi) -> None:
    """Knative Eventing is installed, and the sinks exist."""
    api.kinds |= EVENTING
    for name in ("dead-letters", "answers"):
        api.put(resource("Service", name, "serving.knative.dev/v1", spec={"template": {}}))
