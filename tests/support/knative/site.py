"""A stand-in for a cluster with Knative, a client of its API, and a deployer that talks to it over real HTTP."""

from pathlib import Path
from typing import Any

import pytest

from knative.cluster.client import Cluster
from knative.cluster.deployer import Deployer
from knative.cluster.errors import ClusterError, DeployFailed
from knative.cluster.history import History
from knative.cluster.status import cluster_status
from knative.spec.kubernetes_object import KubernetesObject
from tests.support.knative.knative_controllers import Behaviour
from tests.support.knative.kubernetes_api import KubernetesApi
from tests.support.knative.manifests import stage_name

GATEWAY = ("serving.knative.dev/v1", "services", "default", "chat")  # key of the gateway's Service in the stand-in


class Site:
    def __init__(self, api: KubernetesApi, kubeconfig: Path) -> None:
        kubeconfig.write_text(api.kubeconfig())
        self.api = api
        self.cluster = Cluster.connect(str(kubeconfig))
        self.said: list[str] = []  # by its deployers
        self.deployer = self.deployer_for(5)
        self.history = History(self.cluster, "default", "chat")

    def deployer_for(self, timeout_seconds: float) -> Deployer:
        return Deployer(self.cluster, "default", self.said.append, timeout_seconds=timeout_seconds)

    def fail(
        self,
        rendered: list[KubernetesObject],
        behaviour: Behaviour | None = None,
        stage: int = 1,
        expected: type[ClusterError] = DeployFailed,
    ) -> str:
        """Deploys and returns the error. behaviour: of the stage."""
        if behaviour is not None:
            self.api.behaviours[stage_name(rendered, stage)] = behaviour
        with pytest.raises(expected) as failure:
            self.deployer.deploy(rendered)
        return str(failure.value)

    def status(self) -> dict[str, Any]:
        return cluster_status(self.cluster, "default", "chat")

    def outcomes(self) -> list[tuple[int, str]]:
        return [(version.number, str(version.outcome)) for version in self.history.versions()]
