"""A fleet on the stand-in for a cluster: its gateway, members one by one, a canary of one member, and the end."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from knative.__main__ import main
from knative.commands.fleet import MOST_ROWS, fleet_rows, fleet_status
from storage.store.object_store import ObjectStore
from tests.support.knative.kubernetes_api import KubernetesApi
from tests.support.knative.manifests import OTHER_DIGEST, fleet_document, member_document
from tests.support.knative.real_cluster import FLEET, MODEL, Scenario, Settings
from tests.support.storage.published import published_model


class Fleet:
    """Commands for a fleet in a file."""

    def __init__(self, api: KubernetesApi, folder: Path) -> None:
        api.stages_scale_to_zero = True
        self.file = folder / "fleet.yaml"
        self._kubeconfig = folder / "kubeconfig"
        self._kubeconfig.write_text(api.kubeconfig())

    def write(self, *members: object, **changes: object) -> None:
        self.file.write_text(yaml.safe_dump(fleet_document(members=list(members), **changes)))

    def run(self, *arguments: str) -> str:
        result = CliRunner().invoke(main, [*arguments, "--kubeconfig", str(self._kubeconfig)])
        assert result.exit_code == 0, result.output
        return result.stdout


@pytest.mark.slow
def test_members_are_deployed_changed_tried_and_deleted_one_by_one(api: KubernetesApi, tmp_path: Path) -> None:
    fleet, code, draw = Fleet(api, tmp_path), member_document("code"), member_document("draw", cut="0:30")
    fleet.write(code, draw)
    assert fleet.run("deploy", str(fleet.file)) == "http://models.default.example\n"
    services = api.named("services")
    assert len(services) == 1 + 3 + 1
    assert {"code", "draw"} <= set(api.named("configmaps"))

    rows = fleet.run("status", str(fleet.file)).splitlines()
    assert "2 members, 0 of them at zero" in rows
    before = dict(api.objects)
    fleet.run("deploy", str(fleet.file))
    changed = [key for key, each in api.objects.items() if before.get(key) != each and "Lease" not in str(key)]
    assert not changed, "deploying the same again changes nothing"

    new = member_document("code", model={"name": "code", "digest": OTHER_DIGEST})
    fleet.write(new, draw)
    fleet.run("deploy", str(fleet.file), "--member", "code", "--canary", "10")
    canary = api.objects["v1", "configmaps", "default", "code-canary"]
    assert canary["metadata"]["annotations"]["lamina.dev/percent"] == "10"
    assert canary["data"] != api.objects["v1", "configmaps", "default", "code"]["data"]
    document = json.loads(fleet.run("status", str(fleet.file), "--json"))
    assert [(each["name"], each["canary_percent"]) for each in document["members"]] == [
        ("code", ""),
        ("code", "10"),
        ("draw", ""),
    ]
    gateway = api.objects["serving.knative.dev/v1", "services", "default", "models"]["metadata"]["generation"]

    fleet.run("promote", "code", "--namespace", "default")
    assert "code-canary" not in api.named("configmaps")
    assert api.objects["v1", "configmaps", "default", "code"]["data"] == canary["data"]
    assert len(api.named("services")) == 5, "the old stages are pruned"

    fleet.write(new)
    fleet.run("deploy", str(fleet.file))
    assert "draw" not in api.named("configmaps")
    assert len(api.named("services")) == 4
    assert api.objects["serving.knative.dev/v1", "services", "default", "models"]["metadata"]["generation"] == gateway

    fleet.run("delete", str(fleet.file))
    assert api.named("services") == []
    assert not [name for name in api.named("configmaps") if name.startswith(("code", "draw", "models"))]


@pytest.mark.slow
@pytest.mark.usefixtures("eventing")
def test_a_fleets_eventing_is_deployed_shown_and_removed(api: KubernetesApi, tmp_path: Path) -> None:
    fleet, code = Fleet(api, tmp_path), member_document("code", cut="0:30")
    fleet.write(code, eventing={"dead_letter_sink": "dead-letters", "reply_sink": "answers"})
    fleet.run("deploy", str(fleet.file))
    assert api.named("brokers") == ["models"]
    assert len(api.named("triggers")) == 7
    (gateway,) = api.named("sinkbindings")
    assert gateway in api.named("services")
    shown = json.loads(fleet.run("status", str(fleet.file), "--json"))["eventing"]
    assert {each["kind"] for each in shown} == {"Broker", "Trigger", "SinkBinding"}
    trigger = api.objects["eventing.knative.dev/v1", "triggers", "default", "models-batch"]
    trigger["status"]["conditions"] = [{"type": "Ready", "status": "False", "reason": "BrokerDown"}]
    lines = fleet.run("status", str(fleet.file)).splitlines()
    assert [line for line in lines if "Trigger" in line] == ["Trigger models-batch: NOT ready, BrokerDown"]
    fleet.write(code)
    fleet.run("deploy", str(fleet.file))
    assert [api.named(kind) for kind in ("brokers", "triggers", "sinkbindings")] == [[], [], []]
    assert gateway not in api.named("services")


def test_the_status_of_300_members_fits_on_a_screen() -> None:
    def member(number: int) -> dict[str, object]:
        own = {"name": f"m{number:03}", "model": "x", "canary_percent": "", "pipeline": "f"}
        return own | {
            "stages": 3,
            "ready": number != 150,
            "pods": 1 + (number in (7, 200)) if number % 5 == 0 or number == 7 else 0,
        }

    rows, lines = fleet_rows({"members": [member(number) for number in range(300)]})
    names = [row[0] for row in rows]
    assert len(names) == MOST_ROWS
    assert names == sorted(names)
    assert {"m007", "m150", "m200"} <= set(names), "what is not ready, and most pods, come first"
    assert lines == [f"{61 - MOST_ROWS} more have pods or requests; --json has all"]
    assert fleet_rows({"members": [member(1), member(7)]}) == ([("m007", "x", "yes", "3", "2", "", "f")], [])


@pytest.mark.slow
def test_the_steps_of_the_test_on_a_real_cluster(api: KubernetesApi, tmp_path: Path) -> None:
    """tests/pipeline/test_cluster.py deploys, changes and deletes a fleet by these."""
    api.stages_scale_to_zero = True
    (tmp_path / "kubeconfig").write_text(api.kubeconfig())
    with (
        published_model(tmp_path / "one", name=MODEL) as one,
        published_model(tmp_path / "two", name="two", store=one.store) as two,
    ):
        where = Settings(
            kubeconfig=str(tmp_path / "kubeconfig"),
            context=None,
            namespace="default",
            image="registry.example/lamina:1",
            store=one.store,
            store_endpoint="http://store.example",
            ingress=None,
            other_image=None,
        )
        scenario = Scenario(where, ObjectStore(one.store), [one.manifest, two.manifest], one.tokenizer)
        members = {
            name: {"model": {"name": model, "dtype": "float32"}, "cut": "0:3,3:6"}
            for name, model in (("a", MODEL), ("b", "two"))
        }
        assert scenario.deploy_fleet(tmp_path, members).url == f"http://{FLEET}.default.example"
        before = scenario.stage_services("a")
        members["b"]["cut"] = "0:2,2:4,4:6"
        scenario.deploy_fleet(tmp_path, members)
    assert scenario.stage_services("a") == before
    status = fleet_status(scenario.cluster, "default", FLEET)
    assert {each["name"]: (each["model"], each["stages"]) for each in status["members"]} == {"a": (MODEL, 2), "b": ("two", 3)}
    scenario.delete_fleet()
    assert api.named("services") == []


@pytest.mark.slow
def test_an_aborted_canary_leaves_the_member_as_it_was(api: KubernetesApi, tmp_path: Path) -> None:
    fleet = Fleet(api, tmp_path)
    fleet.write(member_document("code"))
    fleet.run("deploy", str(fleet.file))
    before = api.objects["v1", "configmaps", "default", "code"]["data"], api.named("services")
    fleet.write(member_document("code", model={"name": "code", "digest": OTHER_DIGEST}))
    fleet.run("deploy", str(fleet.file), "--member", "code", "--canary", "50")
    fleet.run("abort", "code", "--namespace", "default")
    assert (api.objects["v1", "configmaps", "default", "code"]["data"], api.named("services")) == before
    assert "code-canary" not in api.named("configmaps")
