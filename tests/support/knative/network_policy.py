"""Simulates NetworkPolicies (networking.k8s.io/v1) as a network that enforces them does: which pod reaches which port.

https://kubernetes.io/docs/concepts/services-networking/network-policies/
"""

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Policy = Mapping[str, Any]


@dataclass(frozen=True)
class Endpoint:
    """A pod or, without a namespace, an address outside of the cluster."""

    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    address: str = "10.244.0.9"
    named_ports: Mapping[str, int] = field(default_factory=dict)
    on_the_same_node: bool = False  # it is the node itself, such as its kubelet


@dataclass(frozen=True)
class Network:
    policies: Sequence[Policy]
    namespaces: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # labels, besides the name that each has

    def reaches(self, source: Endpoint, target: Endpoint, port: int, protocol: str = "TCP") -> bool:
        """Whether a connection is allowed: by the policies of the source for egress, and by those of the target for ingress."""
        if source.on_the_same_node:  # "traffic to and from the node where a Pod is running is always allowed"
            return True
        return self._allows("Egress", source, target, target, port, protocol) and self._allows(
            "Ingress", target, source, target, port, protocol
        )

    def _allows(self, direction: str, owner: Endpoint, other: Endpoint, target: Endpoint, port: int, protocol: str) -> bool:
        """owner: the side whose policies count. Policies add up; a pod that none selects in this direction is open."""
        selecting = [each for each in self.policies if direction in _types(each) and _selects(each, owner)]
        rules, peers = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
        return not selecting or any(
            self._is_peer(policy, rule.get(peers), other) and _is_port(rule.get("ports"), target, port, protocol)
            for policy in selecting
            for rule in policy["spec"].get(rules) or ()
        )

    def _is_peer(self, policy: Policy, peers: Sequence[Mapping[str, Any]] | None, other: Endpoint) -> bool:
        return not peers or any(self._matches(policy, peer, other) for peer in peers)

    def _matches(self, policy: Policy, peer: Mapping[str, Any], other: Endpoint) -> bool:
        if (block := peer.get("ipBlock")) is not None:
            inside = [ipaddress.ip_address(other.address) in ipaddress.ip_network(each) for each in _blocks(block)]
            return inside[0] and not any(inside[1:])
        if not other.namespace:
            return False
        if (wanted := peer.get("namespaceSelector")) is not None:
            own = {"kubernetes.io/metadata.name": other.namespace, **self.namespaces.get(other.namespace, {})}
            if not matches(wanted, own):
                return False
        elif other.namespace != policy["metadata"]["namespace"]:
            return False
        return matches(peer.get("podSelector") or {}, other.labels)


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector matches; an empty one matches everything."""
    if not (selector.get("matchLabels") or {}).items() <= labels.items():
        return False
    for each in selector.get("matchExpressions") or ():
        value, values = labels.get(each["key"]), each.get("values") or ()
        verdicts = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not verdicts[each["operator"]]:
            return False
    return True


def _types(policy: Policy) -> Sequence[str]:
    spec = policy["spec"]
    return spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]


def _selects(policy: Policy, pod: Endpoint) -> bool:
    return pod.namespace == policy["metadata"]["namespace"] and matches(policy["spec"].get("podSelector") or {}, pod.labels)


def _is_port(ports: Sequence[Mapping[str, Any]] | None, target: Endpoint, port: int, protocol: str) -> bool:
    if not ports:
        return True
    for each in ports:
        if each.get("protocol", "TCP") != protocol:
            continue
        wanted = each.get("port")
        first = target.named_ports.get(wanted, -1) if isinstance(wanted, str) else wanted
        if first is None or first <= port <= each.get("endPort", first):
            return True
    return False


def _blocks(block: Mapping[str, Any]) -> Iterator[str]:
    yield block["cidr"]
    yield from block.get("except") or ()
