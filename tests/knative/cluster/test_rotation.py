"""Rotation of the token: at no time does a gateway send a token that a stage does not accept."""

import base64
from typing import Any

import pytest

from knative.cluster.client import Cluster
from knative.cluster.deployer import Deployer
from knative.cluster.errors import DeployFailed, NothingServes
from knative.cluster.history import History
from tests.support.knative.deployments import GATEWAY, objects, stage_name
from tests.support.knative.knative_controllers import never_ready
from tests.support.knative.kubernetes_api import KubernetesApi, labels_of

SECRET = ("v1", "secrets", "default", "chat-pipeline")


def tokens(api: KubernetesApi) -> dict[str, str]:
    return dict(api.objects[SECRET]["data"])


class Readers:
    """The tokens that each pod read from the Secret when it started."""

    def __init__(self, api: KubernetesApi) -> None:
        self._api = api
        self.read: dict[str, dict[str, str]] = {}
        self.refused: list[str] = []
        api.on_change = self.note

    def note(self, key: tuple[str, str, str, str]) -> None:
        if key[1] == "pods":
            self.read[self._api.objects[key]["metadata"]["uid"]] = tokens(self._api)
        self.look()

    def look(self) -> None:
        pods = self._api.found("pods", {})
        gateways = [pod for pod in pods if labels_of(pod)["app.kubernetes.io/component"] == "gateway"]
        stages = [pod for pod in pods if pod not in gateways]
        for gateway in gateways:
            for stage in stages:
                if self._sent(gateway) not in self.read.get(stage["metadata"]["uid"], {"token": self._sent(gateway)}).values():
                    self.refused.append(f"{gateway['metadata']['name']} by {stage['metadata']['name']}")

    def _sent(self, gateway: dict[str, Any]) -> str:
        return self.read.get(gateway["metadata"]["uid"], {"token": "?"})["token"]


def test_no_stage_ever_refuses_a_gateway(api: KubernetesApi, deployer: Deployer, said: list[str]) -> None:
    readers = Readers(api)
    deployer.deploy(objects())
    old = tokens(api)["token"]
    assert deployer.rotate_token("chat") == "http://chat.default.example"
    assert readers.refused == []
    new = tokens(api)
    assert list(new) == ["token"]
    assert new["token"] != old
    assert len(base64.b64decode(new["token"])) >= 32
    assert [line for line in said if line.startswith("token: state")] == [f"token: state {k} of 3" for k in (1, 2, 3)]


def test_every_state_makes_new_pods_and_no_new_version(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    deployer.deploy(objects())
    deployer.rotate_token("chat")
    assert api.objects[GATEWAY]["status"]["latestReadyRevisionName"] == "chat-00004"
    assert len(History(cluster, "default", "chat").versions()) == 1
    deployer.deploy(objects())
    assert api.objects[GATEWAY]["status"]["latestReadyRevisionName"] == "chat-00004", "another deploy changed something"


def test_an_interrupted_rotation_resumes(api: KubernetesApi, deployer: Deployer) -> None:
    readers = Readers(api)
    deployer.deploy(objects())
    stage = stage_name(objects(), 1)
    api.behaviours[stage] = never_ready
    with pytest.raises(DeployFailed):
        deployer.rotate_token("chat")
    assert sorted(tokens(api)) == ["second", "token"]
    half = tokens(api)
    del api.behaviours[stage]
    api.controllers.reconcile(("serving.knative.dev/v1", "services", "default", stage))
    deployer.rotate_token("chat")
    assert tokens(api) == {"token": half["second"]}
    assert readers.refused == []


def test_a_rotation_waits_for_old_gateways(api: KubernetesApi, cluster: Cluster, said: list[str]) -> None:
    impatient = Deployer(cluster, "default", said.append, timeout_seconds=2)
    impatient.deploy(objects())
    api.lingering_gateways = 10_000
    with pytest.raises(DeployFailed, match="old gateway pods still answer"):
        impatient.rotate_token("chat")
    assert sorted(tokens(api)) == ["second", "token"]


def test_a_rotation_needs_a_serving_pipeline(deployer: Deployer) -> None:
    with pytest.raises(NothingServes, match="deploy it first"):
        deployer.rotate_token("chat")
