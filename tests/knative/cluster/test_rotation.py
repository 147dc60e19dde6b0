"""Rotation of the token: at no time does a gateway send a token that a stage does not accept."""

import base64
from typing import Any

import pytest

from knative.cluster.errors import DeployFailed, NothingServes
from tests.support.knative.knative_controllers import never_ready
from tests.support.knative.kubernetes_api import KubernetesApi, labels_of
from tests.support.knative.manifests import objects, stage_name
from tests.support.knative.site import GATEWAY, Site

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


@pytest.mark.slow
def test_no_stage_ever_refuses_a_gateway(site: Site) -> None:
    readers = Readers(site.api)
    site.deployer.deploy(objects())
    old = tokens(site.api)["token"]
    assert site.deployer.rotate_token("chat") == "http://chat.default.example"
    assert readers.refused == []
    new = tokens(site.api)
    assert list(new) == ["token"]
    assert new["token"] != old
    assert len(base64.b64decode(new["token"])) >= 32
    assert [line for line in site.said if line.startswith("token: state")] == [f"token: state {k} of 3" for k in (1, 2, 3)]


@pytest.mark.slow
def test_every_state_makes_new_pods_and_no_new_version(serving: Site) -> None:
    serving.deployer.rotate_token("chat")
    assert serving.api.objects[GATEWAY]["status"]["latestReadyRevisionName"] == "chat-00004"
    assert len(serving.history.versions()) == 1
    serving.deployer.deploy(objects())
    assert serving.api.objects[GATEWAY]["status"]["latestReadyRevisionName"] == "chat-00004", "another deploy changed something"


@pytest.mark.slow
def test_an_interrupted_rotation_resumes(site: Site) -> None:
    readers = Readers(site.api)
    site.deployer.deploy(objects())
    stage = stage_name(objects(), 1)
    site.api.behaviours[stage] = never_ready
    with pytest.raises(DeployFailed):
        site.deployer.rotate_token("chat")
    assert sorted(tokens(site.api)) == ["second", "token"]
    half = tokens(site.api)
    del site.api.behaviours[stage]
    site.api.controllers.reconcile(("serving.knative.dev/v1", "services", "default", stage))
    site.deployer.rotate_token("chat")
    assert tokens(site.api) == {"token": half["second"]}
    assert readers.refused == []


@pytest.mark.slow
def test_a_rotation_waits_for_old_gateways(site: Site) -> None:
    impatient = site.deployer_for(2)
    impatient.deploy(objects())
    site.api.lingering_gateways = 10_000
    with pytest.raises(DeployFailed, match="old gateway pods still answer"):
        impatient.rotate_token("chat")
    assert sorted(tokens(site.api)) == ["second", "token"]


def test_a_rotation_needs_a_serving_pipeline(site: Site) -> None:
    with pytest.raises(NothingServes, match="deploy it first"):
        site.deployer.rotate_token("chat")
