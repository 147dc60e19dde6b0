"""What is missing is reported at once, and nothing is made before."""

import pytest

from knative.cluster.deployer import Deployer
from knative.cluster.errors import PreflightFailed
from tests.support.knative.deployments import account, objects, secret
from tests.support.knative.kubernetes_api import EVENTING, KubernetesApi


def test_all_that_is_missing_is_said_and_nothing_is_made(api: KubernetesApi, deployer: Deployer) -> None:
    api.kinds |= EVENTING
    api.remove("v1", "secrets", "default", "lamina-store")
    spec = {"eventing": {"dead_letter_sink": "dead-letters"}, "gateway": {"api_keys_secret": "chat-api-keys"}}
    with pytest.raises(PreflightFailed) as failure:
        deployer.deploy(objects(spec=spec))
    for text in (
        "lamina-store is missing",
        "chat-api-keys is missing",
        "Service default/dead-letters, a destination of Broker chat",
    ):
        assert text in str(failure.value)
    assert api.applied == []
    assert api.named("secrets") == api.named("configmaps") == api.named("leases") == []


def test_a_namespace_on_its_way_out_takes_nothing(api: KubernetesApi, deployer: Deployer) -> None:
    api.add_namespace("default", phase="Terminating")
    with pytest.raises(PreflightFailed, match=r"namespace default is being deleted.*kubectl create namespace default"):
        deployer.deploy(objects())
    assert api.applied == []


def test_a_namespace_that_is_not_there_is_named_with_the_command(api: KubernetesApi, deployer: Deployer) -> None:
    api.remove("v1", "namespaces", "", "default")
    with pytest.raises(PreflightFailed, match="kubectl create namespace default"):
        deployer.deploy(objects())


def test_without_the_right_to_see_the_namespace_the_apis_own_words_are_told(
    api: KubernetesApi, deployer: Deployer, said: list[str]
) -> None:
    api.forbidden.add(("get", "namespaces"))
    deployer.deploy(objects())
    assert any("not checked, because reading it is not permitted" in line for line in said)


def config_features(api: KubernetesApi, **flags: str) -> None:
    metadata = {"name": "config-features", "namespace": "knative-serving"}
    data = {f"kubernetes.podspec-{name}": value for name, value in flags.items()}
    api.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})


def test_a_feature_that_the_cluster_has_off_is_named_with_the_field_and_the_command(
    api: KubernetesApi, deployer: Deployer
) -> None:
    pod = {"node_selector": {"pool": "models"}, "priority_class": "serving"}
    config_features(api, nodeselector="enabled")
    with pytest.raises(PreflightFailed) as failure:
        deployer.deploy(objects(pod=pod))
    text = str(failure.value)
    assert "-s0 sets priorityClassName, chat" in text
    assert (
        "which needs Knative's feature kubernetes.podspec-priorityclassname; enable it with: kubectl -n knative-serving" in text
    )
    assert "nodeSelector" not in text
    assert api.applied == []


def test_accounts_and_pull_secrets_that_are_not_there_are_named(api: KubernetesApi, deployer: Deployer) -> None:
    """Knative makes a Deployment of them, and no pod ever comes."""
    rendered = objects(service_account="chat-reader", pod={"image_pull_secrets": ["registry"]})
    with pytest.raises(PreflightFailed) as failure:
        deployer.deploy(rendered)
    first, second = str(failure.value).splitlines()
    assert first.startswith("ServiceAccount default/chat-reader is missing; pods of chat-")
    assert first.count("-s") == 3
    assert second.startswith("Secret default/registry is missing; pods of chat-")
    assert api.applied == []
    api.put(account("chat-reader"))
    api.put(secret("registry", ".dockerconfigjson"))
    deployer.deploy(rendered)
