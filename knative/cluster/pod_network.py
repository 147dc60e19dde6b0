"""Whether a gateway will follow the stages' pods: the network in its environment, against the addresses that the pods have."""

import ipaddress
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from knative.cluster.client import Cluster
from knative.cluster.errors import DeployFailed, NotPermitted
from knative.spec.kubernetes_object import KubernetesObject

_SETTING: Final = "LAMINA_POD_NETWORK"
PRIVATE: Final = "10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10,fc00::/7"
"""What a gateway follows that was told no network: the default in functions/configuration/config.py."""


def check(cluster: Cluster, gateway: KubernetesObject, stages: Iterable[KubernetesObject], say: Callable[[str], None]) -> None:
    """Before the gateway moves. Raises DeployFailed where it would not follow a pod that a stage has."""
    networks = followed_networks(gateway)
    try:
        refused = [each for stage in stages for each in refused_pods(networks, _pods_of(cluster, stage))]
    except NotPermitted as error:
        say(f"the network of pods is not checked, since we may not look: {error}")
        return
    if refused:
        raise DeployFailed(
            f"the gateway would not follow pods outside of {networks}: {', '.join(refused)}; set gateway.pod_network to the "
            "network of this cluster's pods. The gateway that serves was not touched"
        )


def followed_networks(gateway: KubernetesObject) -> str:
    """CIDRs, separated by commas, as a gateway's Service has them or leaves them to the function."""
    env = gateway["spec"]["template"]["spec"]["containers"][0].get("env", [])
    return next((entry["value"] for entry in env if entry["name"] == _SETTING), PRIVATE)


def refused_pods(networks: str, pods: Iterable[KubernetesObject]) -> Iterator[str]:
    """Name and addresses of those outside of `networks`; a pod may have one of each kind of IP, and slices of each."""
    followed = [ipaddress.ip_network(each.strip()) for each in networks.split(",")]
    for pod in pods:
        status = pod.get("status") or {}
        addresses = [each["ip"] for each in status.get("podIPs", [])] or [each for each in [status.get("podIP")] if each]
        if addresses and not any(ipaddress.ip_address(each) in network for each in addresses for network in followed):
            yield f"{pod['metadata']['name']} ({', '.join(addresses)})"


def _pods_of(cluster: Cluster, service: KubernetesObject) -> list[KubernetesObject]:
    metadata = service["metadata"]
    return cluster.find("v1", "Pod", metadata["namespace"], f"serving.knative.dev/service={metadata['name']}")
