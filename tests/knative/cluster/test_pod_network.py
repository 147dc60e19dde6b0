"""Whether a gateway follows the pods that its stages have, before it moves."""

import pytest

from functions.configuration.config import GatewayConfig, read_config
from knative.cluster.client import Cluster
from knative.cluster.deployer import Deployer
from knative.cluster.errors import DeployFailed
from knative.cluster.preflight import PRIVATE_NETWORKS, refused_pods
from knative.cluster.status import cluster_status
from knative.spec.kubernetes_object import KubernetesObject
from tests.support.environments import GATEWAY
from tests.support.knative.deployments import objects, stage_name
from tests.support.knative.kubernetes_api import KubernetesApi


def metadata(name: str, **labels: str) -> KubernetesObject:
    return {"name": name, "namespace": "default", "labels": labels}


def pod(name: str, service: str, *addresses: str) -> KubernetesObject:
    about = metadata(name) | {"labels": {"serving.knative.dev/service": service}}
    status = {"phase": "Running", "podIP": addresses[0], "podIPs": [{"ip": each} for each in addresses]} if addresses else {}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": about, "status": status}


def test_a_wrong_network_of_pods_is_found_before_the_gateway_moves(api: KubernetesApi, deployer: Deployer) -> None:
    """It was a silent outage: every address refused, and deploy said that all was well."""
    rendered = objects(spec={"gateway": {"pod_network": "10.0.0.0/8"}})
    api.put(pod("far", stage_name(rendered, 1), "192.168.3.4"))
    with pytest.raises(DeployFailed, match=r"outside of 10\.0\.0\.0/8: far \(192\.168\.3\.4\); set gateway\.pod_network"):
        deployer.deploy(rendered)
    assert "chat" not in api.applied


def test_pods_inside_of_it_do(api: KubernetesApi, deployer: Deployer) -> None:
    rendered = objects()
    api.put(pod("near", stage_name(rendered, 1), "192.168.3.4"))
    assert deployer.deploy(rendered).startswith("http")


def test_without_the_right_to_look_it_is_said(api: KubernetesApi, deployer: Deployer, said: list[str]) -> None:
    rendered = objects(spec={"gateway": {"pod_network": "10.0.0.0/8"}})
    api.put(pod("far", stage_name(rendered, 1), "192.168.3.4"))
    api.forbidden.add(("list", "pods"))
    deployer.deploy(rendered)
    assert any(line.startswith("the pods' network is not checked") for line in said)


def test_status_says_which_pods_are_not_followed(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    """Such as those of nodes that have come since, in a network of their own."""
    rendered = objects(spec={"gateway": {"pod_network": "10.0.0.0/8"}})
    deployer.deploy(rendered)
    assert cluster_status(cluster, "default", "chat")["troubles"] == []
    far = pod("far", stage_name(rendered, 1), "192.168.3.4")
    labels = {"instance": "chat", "component": "stage", "managed-by": "lamina"}
    far["metadata"]["labels"] |= {f"app.kubernetes.io/{name}": value for name, value in labels.items()}
    api.put(far)
    (trouble,) = cluster_status(cluster, "default", "chat")["troubles"]
    assert trouble.startswith("chat does not follow pods outside of 10.0.0.0/8: far (192.168.3.4); requests go by the")


def test_which_addresses_count() -> None:
    networks = "10.0.0.0/8, fd00::/64"
    pods = [pod("a", "s", "10.1.1.1"), pod("b", "s", "192.168.1.1", "fd00::7"), pod("c", "s"), pod("d", "s", "172.16.0.1")]
    assert list(refused_pods(networks, pods)) == ["d (172.16.0.1)"]


def test_the_default_is_the_gateways() -> None:
    config = read_config(GATEWAY)
    assert isinstance(config, GatewayConfig)
    assert ",".join(map(str, config.pod_network)) == PRIVATE_NETWORKS
