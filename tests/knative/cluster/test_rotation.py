"""Rotation of the token: at no time does a gateway send a token that a stage does not accept."""

import base64
from typing import Any

import pytest

from knative.cluster.errors import DeployFailed, NothingServes, Rejected
from knative.commands.fleet import deploy_fleet
from knative.render.fleet import member_files
from tests.support.knative.knative_controllers import never_ready
from tests.support.knative.kubernetes_api import KubernetesApi, labels_of
from tests.support.knative.manifests import fleet_members, fleet_of, objects, stage_name
from tests.support.knative.site import GATEWAY, Site


def tokens(api: KubernetesApi, secret: str = "chat-pipeline") -> dict[str, str]:
    return dict(api.objects["v1", "secrets", "default", secret]["data"])


class Readers:
    """The tokens that each pod read from the Secret when it started."""

    def __init__(self, api: KubernetesApi, secret: str = "chat-pipeline") -> None:
        self._api = api
        self._secret = secret
        self.read: dict[str, dict[str, str]] = {}
        self.refused: list[str] = []
        api.on_change = self.note

    def note(self, key: tuple[str, str, str, str]) -> None:
        if key[1] == "pods":
            self.read[self._api.objects[key]["metadata"]["uid"]] = tokens(self._api, self._secret)
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


def deploy_two_members(site: Site) -> None:
    members = {each.spec.name: member_files(each) for each in fleet_members("code", "draw")}
    deploy_fleet(site.deployer, fleet_of(), members, whole=True, force=False)


@pytest.mark.slow
def test_all_members_of_a_fleet_get_its_new_token(site: Site) -> None:
    readers = Readers(site.api, "models-pipeline")
    deploy_two_members(site)
    old = tokens(site.api, "models-pipeline")["token"]
    assert site.deployer.rotate_token("models") == "http://models.default.example"
    new = tokens(site.api, "models-pipeline")
    assert list(new) == ["token"]
    assert new["token"] != old
    assert readers.refused == []
    pods = site.api.found("pods", {})
    assert len(pods) == 1 + 2 * 3
    assert all(readers.read[pod["metadata"]["uid"]] == new for pod in pods), "no pod takes the old token any more"


@pytest.mark.slow
def test_a_rotation_of_a_fleet_goes_on_with_the_member_that_failed(site: Site) -> None:
    readers = Readers(site.api, "models-pipeline")
    deploy_two_members(site)
    stage = fleet_members("draw")[0].stage_name(1)
    site.api.behaviours[stage] = never_ready
    with pytest.raises(DeployFailed):
        site.deployer.rotate_token("models")
    half = tokens(site.api, "models-pipeline")
    del site.api.behaviours[stage]
    site.api.controllers.reconcile(("serving.knative.dev/v1", "services", "default", stage))
    with pytest.raises(Rejected, match=r"code shares the token of the fleet models; .*: rotate-token models"):
        site.deployer.rotate_token("code")
    site.deployer.rotate_token("models")
    assert tokens(site.api, "models-pipeline") == {"token": half["second"]}
    assert readers.refused == []
