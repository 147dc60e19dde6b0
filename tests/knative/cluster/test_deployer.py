"""The deployer over real HTTP, against a stand-in for the Kubernetes API. Nothing in the deployer knows it is one."""

import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from knative.cluster.client import Cluster
from knative.cluster.deployer import Deployer
from knative.cluster.errors import (
    ClusterError,
    ClusterUnreachable,
    DeployFailed,
    FieldConflict,
    KindMissing,
    NotPermitted,
    PreflightFailed,
    Rejected,
)
from knative.cluster.garbage import GarbageCollector
from knative.cluster.history import History, gateway_of
from knative.spec.kubernetes_object import KubernetesObject
from tests.support.knative.deployments import objects, secret, stage_name
from tests.support.knative.knative_controllers import (
    crash_loops,
    image_pull_fails,
    never_ready,
    revision_fails,
)
from tests.support.knative.kubernetes_api import KubernetesApi
from tests.support.storage.storage import answering_every_get_with


def test_deploys_stages_before_the_gateway_and_returns_its_url(api: KubernetesApi, deployer: Deployer, said: list[str]) -> None:
    rendered = objects()
    assert deployer.deploy(rendered) == "http://chat.default.example"
    services = [name for name in api.applied if name in api.named("services")]
    assert services == [*(stage_name(rendered, k) for k in range(3)), "chat"]
    assert "chat-pipeline" in api.named("secrets"), "the pipeline's token is made where there is none"
    assert any("version 1" in line for line in said)


def test_a_second_deploy_changes_nothing(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    deployer.deploy(objects())
    before = {key: each["metadata"].get("generation") for key, each in api.objects.items()}
    deployer.deploy(objects())
    after = {key: each["metadata"].get("generation") for key, each in api.objects.items()}
    assert after == before
    assert [version.number for version in History(cluster, "default", "chat").versions()] == [1]


def test_a_new_cut_goes_out_beside_the_old_one_which_is_pruned_when_its_sequences_ended(
    api: KubernetesApi, deployer: Deployer, said: list[str]
) -> None:
    old, new = objects(), objects(((0, 15), (15, 30)))
    deployer.deploy(old)
    api.lingering_gateways = 3
    deployer.deploy(new)
    left = api.named("services")
    assert left == sorted([stage_name(new, 0), stage_name(new, 1), "chat"])
    finishing = next(k for k, line in enumerate(said) if "still finish their answers" in line)
    assert finishing < next(k for k, line in enumerate(said) if "pruned" in line)


def test_old_stages_stay_while_an_old_gateway_lives(api: KubernetesApi, cluster: Cluster, said: list[str]) -> None:
    patient = Deployer(cluster, "default", said.append, timeout_seconds=0.2)
    old = objects()
    patient.deploy(old)
    api.lingering_gateways = 10_000
    patient.deploy(objects(digest="e" * 64))
    assert stage_name(old, 0) in api.named("services")
    assert any("next deploy prunes" in line for line in said)


def test_rollback_brings_the_last_other_version_back(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    first, second = objects(), objects(digest="e" * 64)
    deployer.deploy(first)
    deployer.deploy(second)
    deployer.rollback("chat")
    assert stage_name(first, 0) in api.named("services")
    assert stage_name(second, 0) not in api.named("services")
    assert [version.number for version in History(cluster, "default", "chat").versions()] == [1, 2, 3]
    deployer.rollback("chat")
    assert stage_name(second, 0) in api.named("services")


def test_rollback_says_what_is_known(deployer: Deployer) -> None:
    with pytest.raises(ClusterError, match="deploy it first"):
        deployer.rollback("chat")
    deployer.deploy(objects())
    with pytest.raises(ClusterError, match="nothing to go back to"):
        deployer.rollback("chat")
    with pytest.raises(ClusterError, match="known are 1"):
        deployer.rollback("chat", 7)


def test_delete_removes_everything_it_made_and_nothing_else(
    api: KubernetesApi, cluster: Cluster, deployer: Deployer, said: list[str]
) -> None:
    garbage = GarbageCollector(cluster, "default", said.append, timeout_seconds=5)
    deployer.deploy(objects())
    stranger = secret("somebody-elses", "token")
    api.put(stranger)
    garbage.collect_all("chat")
    assert {key[3] for key in api.objects} == {"default", "lamina-store", "somebody-elses"}
    assert garbage.collect_all("chat") == 0


def test_what_the_spec_does_not_ask_for_any_more_is_deleted(api: KubernetesApi, deployer: Deployer) -> None:
    deployer.deploy(objects())
    assert len(api.named("networkpolicies")) == 2
    deployer.deploy([each for each in objects() if each["kind"] != "NetworkPolicy"])
    assert api.named("networkpolicies") == []
    assert {"chat-pipeline", "lamina-store"} <= set(api.named("secrets"))
    assert len(api.named("services")) == 4


def test_diff_is_the_clusters_own_dry_run(api: KubernetesApi, deployer: Deployer) -> None:
    deployer.deploy(objects())
    assert list(deployer.diff(objects())) == []
    before = dict(api.objects)
    lines = list(deployer.diff(objects(kv_cache="1Gi")))
    assert any(line.startswith("-") and "536870912" in line for line in lines)
    assert any(line.startswith("+") and "1073741824" in line for line in lines)
    assert api.objects == before


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        (
            image_pull_fails,
            ["does not become ready", "ImagePullBackOff", "registry.example/lamina:missing", "next: check the image's"],
        ),
        (crash_loops, ["CrashLoopBackOff", "ended with 1", "bucket 'lamina' does not exist", "next: the last log lines"]),
        (revision_fails, ["initial scale was never achieved", "FailedCreate", "exceeded quota", "next: lower the resources"]),
    ],
)
def test_a_stage_that_fails_is_explained_and_the_gateway_stays_as_it_was(
    api: KubernetesApi, deployer: Deployer, behaviour: object, expected: list[str]
) -> None:
    deployer.deploy(objects())
    broken = objects(digest="e" * 64)
    api.behaviours[stage_name(broken, 1)] = behaviour  # type: ignore[assignment]
    serving = api.objects["serving.knative.dev/v1", "services", "default", "chat"]["spec"]
    with pytest.raises(DeployFailed) as failure:
        deployer.deploy(broken)
    for text in (stage_name(broken, 1), *expected):
        assert text in str(failure.value)
    assert api.objects["serving.knative.dev/v1", "services", "default", "chat"]["spec"] == serving


def test_a_stage_that_never_becomes_ready_ends_with_the_timeout(api: KubernetesApi, cluster: Cluster, said: list[str]) -> None:
    rendered = objects()
    api.behaviours[stage_name(rendered, 2)] = never_ready
    with pytest.raises(DeployFailed, match=r"not ready after 0\.5 s"):
        Deployer(cluster, "default", said.append, timeout_seconds=0.5).deploy(rendered)


def test_somebody_elses_fields_are_not_taken_without_being_asked(
    api: KubernetesApi, cluster: Cluster, deployer: Deployer
) -> None:
    deployer.deploy(objects())
    key = ("serving.knative.dev/v1", "services", "default", "chat")
    path = ("spec", "template", "metadata", "annotations", "autoscaling.knative.dev/max-scale")
    api.edit(key, "kubectl-edit", path, "99")
    with pytest.raises(FieldConflict, match=r"kubectl-edit.*max-scale.*--force-conflicts"):
        deployer.deploy(objects())
    deployer.deploy(objects(), force=True)
    annotations = api.objects[key]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["autoscaling.knative.dev/max-scale"] == "3"


def test_the_webhooks_refusal_names_the_field(deployer: Deployer) -> None:
    rendered = objects()
    gateway_of(rendered)["spec"]["template"]["spec"]["timeoutSeconds"] = 601
    with pytest.raises(Rejected, match=r"timeoutSeconds"):
        deployer.deploy(rendered)


def test_quota_is_named_with_what_to_do(api: KubernetesApi, deployer: Deployer) -> None:
    api.quota_message = "cpu: requested 3, limited 2"
    with pytest.raises(Rejected, match=r"exceeded quota: cpu.*lower the resources"):
        deployer.deploy(objects())


def test_without_knative_nothing_is_applied(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    del api.kinds["serving.knative.dev/v1"]
    with pytest.raises(KindMissing, match="install Knative Serving"):
        deployer.deploy(objects())
    assert api.applied == []


def test_without_the_prometheus_operator_monitoring_is_refused(api: KubernetesApi, deployer: Deployer) -> None:
    monitor = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "chat", "namespace": "default", "labels": {}},
    }
    with pytest.raises(KindMissing, match=r"does not serve PodMonitor.*Prometheus operator, or leave monitoring out"):
        deployer.deploy([*objects(), monitor])
    assert api.applied == []


def deployment(name: str, version: str) -> KubernetesObject:
    metadata = {"name": name, "namespace": "knative-serving", "labels": {"app.kubernetes.io/version": version}}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata}


def test_an_old_knative_is_refused(api: KubernetesApi, deployer: Deployer) -> None:
    api.put(deployment("controller", "1.9.2"))
    with pytest.raises(PreflightFailed, match=r"1\.9\.2 is too old"):
        deployer.deploy(objects())


def test_hpa_needs_its_extension_and_a_metrics_server(api: KubernetesApi, deployer: Deployer, cluster: Cluster) -> None:
    rendered = objects(autoscaling={"class": "hpa", "min_scale": 1})
    with pytest.raises(PreflightFailed, match="HPA extension"):
        deployer.deploy(rendered)
    api.put(deployment("autoscaler-hpa", "1.18.0"))
    with pytest.raises(PreflightFailed, match="metrics server"):
        deployer.deploy(rendered)
    api.kinds["metrics.k8s.io/v1"] = {"PodMetrics": "pods"}
    deployer.deploy(rendered)


def test_a_missing_store_secret_is_named_with_the_command(api: KubernetesApi, deployer: Deployer) -> None:
    api.remove("v1", "secrets", "default", "lamina-store")
    with pytest.raises(PreflightFailed, match=r"lamina-store.*kubectl -n default create secret generic"):
        deployer.deploy(objects())


def test_what_may_not_be_looked_at_is_said_and_what_may_not_be_done_ends(
    api: KubernetesApi, deployer: Deployer, said: list[str]
) -> None:
    api.forbidden.add(("get", "deployments"))
    deployer.deploy(objects())
    assert any("not checked" in line for line in said)
    api.forbidden.add(("patch", "services"))
    with pytest.raises(NotPermitted, match="ask for a Role"):
        deployer.deploy(objects(digest="e" * 64))


def test_a_half_deleted_object_is_waited_for(api: KubernetesApi, deployer: Deployer, said: list[str]) -> None:
    deployer.deploy(objects())
    key = ("serving.knative.dev/v1", "services", "default", "chat")
    held = {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["example.com/hold"]}
    api.put({**api.objects[key], "metadata": {**api.objects[key]["metadata"], **held}})
    with pytest.raises(DeployFailed, match=r"example\.com/hold"):
        deployer.deploy(objects())
    timer = threading.Timer(0.5, api.finish_deletion, [key])
    timer.start()
    deployer.deploy(objects())
    timer.join()
    assert any("being deleted" in line for line in said)


def test_no_cluster_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, api: KubernetesApi) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ClusterUnreachable, match="--kubeconfig"):
        Cluster.connect(str(tmp_path / "absent"))
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(api.kubeconfig())
    with pytest.raises(ClusterUnreachable, match="nowhere"):
        Cluster.connect(str(kubeconfig), "nowhere")
    api.close()
    with pytest.raises(ClusterUnreachable, match="does not answer"):
        Cluster.connect(str(kubeconfig))


@pytest.mark.parametrize("text", [": : :\n- [", "hello", "", "apiVersion: v1\nkind: Config\n", "\udcff"])
def test_what_is_no_kubeconfig_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    path = tmp_path / "broken"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ClusterUnreachable, match="broken"):
        Cluster.connect(str(path))


def test_what_is_no_kubernetes_api_is_named(tmp_path: Path, api: KubernetesApi) -> None:
    with answering_every_get_with(b"<html>hello</html>") as url:
        kubeconfig = tmp_path / "kubeconfig"
        own = urlsplit(yaml.safe_load(api.kubeconfig())["clusters"][0]["cluster"]["server"]).netloc
        kubeconfig.write_text(api.kubeconfig().replace(own, urlsplit(url).netloc))
        with pytest.raises(ClusterUnreachable, match="answers, but not as a Kubernetes API does"):
            Cluster.connect(str(kubeconfig))


def test_logs_are_read_and_followed(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    deployer.deploy(objects())
    api.logs["chat-00001-pod"] = "one\ntwo\n"
    assert cluster.log_tail("default", "chat-00001-pod", "user-container", 10) == ["one", "two"]
    assert list(cluster.follow_log("default", "chat-00001-pod", "user-container", 10)) == ["one", "two"]
    assert cluster.log_tail("default", "unknown", "user-container", 10) == []
