"""Commands of a cluster, run as a person types them, against the stand-in for the Kubernetes API."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from knative.__main__ import main
from tests.support.knative.knative_controllers import image_pull_fails
from tests.support.knative.kubernetes_api import KubernetesApi
from tests.support.knative.manifests import DIGEST, document, features, service

URL = "http://chat.default.example\n"
SPEC = document(model={"name": "smollm2", "digest": DIGEST})


@pytest.fixture(autouse=True)
def spec_file(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(SPEC))


def run(tmp_path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--kubeconfig", str(tmp_path / "kubeconfig")])


def output(tmp_path: Path, *arguments: str) -> str:
    """What a command prints that succeeds."""
    done = run(tmp_path, *arguments)
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_pipeline_is_deployed_changed_rolled_back_and_deleted(api: KubernetesApi, tmp_path: Path) -> None:
    spec = str(tmp_path / "pipeline.yaml")
    assert "+kind: Service" in output(tmp_path, "deploy", spec, "--dry-run=server")
    assert api.named("services") == []
    assert output(tmp_path, "deploy", spec) == URL
    assert len(api.named("services")) == 4
    assert run(tmp_path, "deploy", spec, "--dry-run=server").stdout == "nothing would change\n"

    Path(spec).write_text(yaml.safe_dump(SPEC | {"cut": "0:15,15:30"}))
    assert output(tmp_path, "deploy", spec) == URL
    assert len(api.named("services")) == 3
    assert output(tmp_path, "rollback", "chat") == URL
    assert len(api.named("services")) == 4

    shown = run(tmp_path, "status", "chat")
    assert [line.split()[:3] for line in shown.stdout.splitlines()[1:2]] == [["chat", "yes", "1"]], shown.stderr
    assert len(shown.stdout.splitlines()) == 6
    assert shown.stdout.splitlines()[-1].startswith("version 3 serves, pipeline ")
    assert run(tmp_path, "status", spec).stdout == shown.stdout
    document = json.loads(run(tmp_path, "status", "chat", "--json").stdout)
    assert [len(each["revisions"]) for each in document["services"]] == [1, 1, 1, 1]
    assert "no pipeline other" in run(tmp_path, "status", "other").stderr

    api.logs["chat-00003-pod"] = "one\ntwo\n"
    assert run(tmp_path, "logs", "chat").stdout == "chat-00003-pod: one\nchat-00003-pod: two\n"
    assert "it may be scaled to zero" in run(tmp_path, "logs", "other").stderr

    assert "objects deleted" in output(tmp_path, "delete", "chat")
    assert {key[3] for key in api.objects} == {"default", "lamina-store"}
    assert run(tmp_path, "delete", "chat").stdout == "nothing of chat is in namespace default\n"


@pytest.mark.slow
def test_a_failure_has_its_cause_and_no_traceback(api: KubernetesApi, tmp_path: Path) -> None:
    api.behaviours["chat"] = image_pull_fails
    failed = run(tmp_path, "deploy", str(tmp_path / "pipeline.yaml"))
    assert failed.exit_code == 1
    assert "ImagePullBackOff" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_missing_cluster_is_one_line(tmp_path: Path) -> None:
    result = run(tmp_path, "delete", "chat")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no cluster to talk to" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_check_reads_the_clusters_feature_flags(api: KubernetesApi, tmp_path: Path) -> None:
    (tmp_path / "service.yaml").write_text(yaml.safe_dump(service({"nodeSelector": {"disk": "fast"}})))
    command = ("check", "--features", "cluster", str(tmp_path / "service.yaml"))
    assert "config-features does not exist" in run(tmp_path, *command).stderr
    api.put(features(**{"kubernetes.podspec-nodeselector": "enabled"}))
    assert run(tmp_path, *command).stdout == f"{tmp_path / 'service.yaml'}: accepted\n"


@pytest.mark.slow
def test_logs_find_a_container_that_kn_has_renamed(api: KubernetesApi, tmp_path: Path) -> None:
    """A second `kn service apply` of the same file calls it user-container."""
    assert output(tmp_path, "deploy", str(tmp_path / "pipeline.yaml")) == URL
    for key in [key for key in api.objects if key[1] == "pods"]:
        pod = api.objects[key]
        renamed = [{**each, "name": "user-container"} for each in pod["spec"]["containers"][:1]]
        api.put({**pod, "spec": {**pod["spec"], "containers": [pod["spec"]["containers"][1], *renamed]}})
    api.logs["chat-00001-pod"] = "one\n"
    read = run(tmp_path, "logs", str(tmp_path / "pipeline.yaml"))
    assert read.stdout == "chat-00001-pod: one\n"
    assert read.stderr.count("its container user-container has no log") == 3, "pods without a log are named"


@pytest.mark.slow
def test_canary_promote_and_abort(api: KubernetesApi, tmp_path: Path) -> None:
    spec, other = tmp_path / "pipeline.yaml", tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(SPEC | {"cut": "0:15,15:30"}))
    assert output(tmp_path, "deploy", str(spec)) == URL
    for command in ("abort", "promote"):
        assert output(tmp_path, "deploy", str(other), "--canary", "10") == URL
        assert len(api.named("services")) == 6
        assert output(tmp_path, command, "chat") == URL
        assert len(api.named("services")) == {"abort": 4, "promote": 3}[command]


@pytest.mark.slow
def test_list_and_cost(api: KubernetesApi, tmp_path: Path) -> None:
    spec = tmp_path / "pipeline.yaml"
    assert "no pipeline is in any namespace" in run(tmp_path, "list").stderr
    api.add_namespace("models")
    keys = api.objects["v1", "secrets", "default", "lamina-store"]
    api.put({**keys, "metadata": {**keys["metadata"], "namespace": "models"}})
    for namespace in ("default", "models"):
        spec.write_text(yaml.safe_dump(SPEC | {"namespace": namespace}))
        assert output(tmp_path, "deploy", str(spec)) == f"http://chat.{namespace}.example\n"
    rows = [line.split() for line in run(tmp_path, "list").stdout.splitlines()[1:]]
    assert [row[:5] for row in rows] == [[namespace, "chat", "yes", "3", "4"] for namespace in ("default", "models")]
    api.forbidden_everywhere = True
    alone = run(tmp_path, "list")
    assert [line.split()[0] for line in alone.stdout.splitlines()[1:]] == ["default"]
    assert "only namespace default" in alone.stderr
    counted = run(tmp_path, "cost", str(spec))
    assert [line.split()[0] for line in counted.stdout.splitlines()[1:]][-1] == "all"
    assert "name a Prometheus with --prometheus" in counted.stderr
    assert run(tmp_path, "cost", "chat", "--since", "soon").exit_code == 2


@pytest.mark.slow
def test_deployer_role_and_preflight(api: KubernetesApi, tmp_path: Path) -> None:
    spec = str(tmp_path / "pipeline.yaml")
    role = yaml.safe_load(CliRunner().invoke(main, ["render", spec, "--deployer-role"]).stdout)
    assert (role["kind"], role["metadata"]["namespace"]) == ("Role", "default")
    assert run(tmp_path, "preflight", spec).stdout == "nothing is missing\n"
    assert "chat-pipeline" in api.named("secrets")
    api.remove("v1", "secrets", "default", "lamina-store")
    lacking = run(tmp_path, "preflight", spec)
    assert lacking.exit_code == 1
    assert "Secret default/lamina-store is missing" in lacking.stderr


@pytest.mark.slow
def test_a_token_is_rotated(api: KubernetesApi, tmp_path: Path) -> None:
    secret = "v1", "secrets", "default", "chat-pipeline"
    assert output(tmp_path, "deploy", str(tmp_path / "pipeline.yaml")) == URL
    before = api.objects[secret]["data"]["token"]
    assert output(tmp_path, "rotate-token", "chat") == URL
    assert api.objects[secret]["data"]["token"] != before
