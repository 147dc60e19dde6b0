"""Who reaches whom, by the rendered NetworkPolicies, in a network that enforces them; roles and budgets are minimal."""

from itertools import product
from typing import Any, Final

import pytest

from knative.render.access import gateway_access, network_policies
from knative.render.rendering import render
from tests.support.knative.manifests import resolved_pipeline
from tests.support.knative.network_policy import Endpoint, Network

OPEN, DENY_INGRESS = [], {"podSelector": {}, "policyTypes": ["Ingress"]}
PORTS: Final = (8012, 8013, 8022, 8080, 8112, 8443, 9090, 9091, 9464)  # queue-proxy's, the function's, the stage's with TLS
PLAIN: Final[dict[str, Any]] = {}
KNATIVES: Final = {"network": {"tls": {}}}
OWN: Final = {"network": {"tls": {"secret": "chat-tls"}}}
REQUESTS: Final = {8012, 8112}
SERVING: Final = "knative-serving"

STRANGERS: Final = {
    "a pod of the namespace": Endpoint("models", {"app": "shell"}),
    "a pod of another": Endpoint("default"),
    "another pipeline's gateway": Endpoint(
        "models", {"app.kubernetes.io/instance": "other", "app.kubernetes.io/component": "gateway"}
    ),
    "a gateway of that name elsewhere": Endpoint(
        "default", {"app.kubernetes.io/instance": "chat", "app.kubernetes.io/component": "gateway"}
    ),
    "Knative's webhook": Endpoint(SERVING, {"app": "webhook"}),
    "an activator elsewhere": Endpoint("default", {"app": "activator"}),
    "the network outside": Endpoint(address="203.0.113.7"),
}


def pods(changes: dict[str, Any]) -> dict[str, Endpoint]:
    """The pipeline's pods by component, with the labels that Knative copies from the template."""
    rendered = [each for objects in render(resolved_pipeline(namespace="models", **changes)).values() for each in objects]
    found = {}
    for each in rendered:
        if each["apiVersion"].startswith("serving"):
            name = each["metadata"]["name"]
            key = "stage" if name.endswith("-s1") else "events" if name.endswith("-ev") else "gateway" if name == "chat" else ""
            own = {**each["spec"]["template"]["metadata"]["labels"], "serving.knative.dev/service": name}
            found |= {key: Endpoint("models", own)} if key else {}
    return found


def network(changes: dict[str, Any], *others: dict[str, Any]) -> Network:
    own = network_policies(resolved_pipeline(namespace="models", **changes))
    more = [{"metadata": {"namespace": "models", "name": "own"}, "spec": each} for each in others]
    return Network([*own, *more], {"models": {"team": "ml"}})


def open_ports(net: Network, source: Endpoint, target: Endpoint) -> set[int]:
    return {port for port in PORTS if net.reaches(source, target, port)}


# Whether or not the namespace also denies all ingress that no policy allows, as many do.
@pytest.mark.parametrize("others", [(), (DENY_INGRESS,)], ids=["alone", "beside deny-all"])
@pytest.mark.parametrize(
    ("changes", "between_pods"),
    [(PLAIN, {8012}), (KNATIVES, {8012, 8112}), (OWN, {8012, 8443})],
    ids=["plain", "Knative's TLS", "own TLS"],
)
def test_each_component_reaches_exactly_its_ports(
    changes: dict[str, Any], between_pods: set[int], others: tuple[dict[str, Any], ...]
) -> None:
    """8012 is open between the pipeline's pods with TLS, too: gateways from before the change need it."""
    net, own = network(changes, *others), pods(changes)
    stage, gateway = own["stage"], own["gateway"]
    assert open_ports(net, gateway, stage) == open_ports(net, stage, stage) == between_pods
    assert open_ports(net, stage, gateway) == open_ports(net, gateway, gateway) == set()
    for target in (stage, gateway):
        assert open_ports(net, Endpoint(SERVING, {"app": "activator"}), target) == REQUESTS, "with system-internal-tls 8112"
        assert open_ports(net, Endpoint("kourier-system", {"app": "3scale-kourier-gateway"}), target) == REQUESTS
        assert open_ports(net, Endpoint(SERVING, {"app": "autoscaler"}), target) == {9090}
        assert open_ports(net, Endpoint("monitoring", {"app": "prometheus"}), target) == {9091, 9464}
        assert open_ports(net, Endpoint(on_the_same_node=True), target) == set(PORTS), "the kubelet's probes and hooks"


@pytest.mark.parametrize("changes", [PLAIN, KNATIVES, OWN], ids=["plain", "Knative's TLS", "own TLS"])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_reach_nothing(changes: dict[str, Any], stranger: str) -> None:
    net = network(changes)
    assert [open_ports(net, STRANGERS[stranger], target) for target in pods(changes).values()] == [set(), set()]


def test_with_eventing_its_pods_reach_all_for_requests_only() -> None:
    changes = {"eventing": {"dead_letter_sink": "http://sink.example"}}
    net, own = network(changes), pods(changes)
    assert own.keys() == {"stage", "gateway", "events"}
    for component, target in own.items():
        dispatcher = Endpoint("knative-eventing", {"messaging.knative.dev/role": "dispatcher"})
        assert open_ports(net, dispatcher, target) == REQUESTS, component
    assert open_ports(net, own["events"], own["stage"]) == {8012}


def test_an_ingress_may_have_several_namespaces() -> None:
    """Contour has one for clients and one for cluster-local Services; both lead to every kind of pod."""
    namespaces = ["contour-external", "contour-internal"]
    changes = {"network": {"ingress_namespace": namespaces}}
    net = network(changes)
    for name, target in product(namespaces, pods(changes).values()):
        assert open_ports(net, Endpoint(name, {"app": "envoy"}), target) == REQUESTS
    assert open_ports(net, Endpoint("kourier-system"), pods(changes)["stage"]) == set()


def test_nothing_limits_what_pods_ask_others() -> None:
    """DNS, the store in the namespace or outside, Redis, the Kubernetes API, the trace collector."""
    dns = Endpoint("kube-system", {"k8s-app": "kube-dns"})
    store_in_the_namespace = Endpoint("models", {"app": "minio"})
    outside = Endpoint(address="198.51.100.4")
    net = network(PLAIN)
    for source in pods(PLAIN).values():
        assert all(net.reaches(source, dns, 53, protocol) for protocol in ("TCP", "UDP"))
        assert net.reaches(source, store_in_the_namespace, 9000)
        assert all(net.reaches(source, outside, port) for port in (443, 4318, 6379))


def test_without_policies_all_is_open() -> None:
    assert "network.yaml" not in render(resolved_pipeline(network={"policies": False}))
    assert open_ports(Network([]), STRANGERS["a pod of another"], pods(PLAIN)["stage"]) == set(PORTS)


# -- The simulator itself, by the examples of Kubernetes' own page ------------------------------------------------------------


def policy(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "default", "name": "x"}, "spec": {"podSelector": {"matchLabels": {"role": "db"}}, **spec}}


DB: Final = Endpoint("default", {"role": "db"}, "10.0.0.5", {"sql": 6379})
CLIENT: Final = {"podSelector": {"matchLabels": {"role": "client"}}}
ALICE: Final = {"namespaceSelector": {"matchLabels": {"user": "alice"}}}
BLOCK: Final = {"ipBlock": {"cidr": "172.17.0.0/16", "except": ["172.17.1.0/24"]}}
SQL: Final = {"protocol": "TCP", "port": 6379}


@pytest.mark.parametrize(
    ("rule", "source", "port", "allowed"),
    [
        ({}, Endpoint("other"), 1, True),
        ({"from": [CLIENT]}, Endpoint("default", {"role": "client"}), 1, True),
        ({"from": [CLIENT]}, Endpoint("alices", {"role": "client"}), 1, False),
        ({"from": [ALICE]}, Endpoint("alices"), 1, True),
        ({"from": [ALICE]}, Endpoint("default", {"user": "alice"}), 1, False),
        ({"from": [ALICE | CLIENT]}, Endpoint("alices"), 1, False),
        ({"from": [ALICE | CLIENT]}, Endpoint("alices", {"role": "client"}), 1, True),
        ({"from": [ALICE, CLIENT]}, Endpoint("alices"), 1, True),
        ({"from": [{"namespaceSelector": {}}]}, Endpoint("other"), 1, True),
        ({"from": [{"podSelector": {}}]}, Endpoint("other"), 1, False),
        ({"from": [{"namespaceSelector": {}}]}, Endpoint(address="10.9.9.9"), 1, False),
        ({"from": [BLOCK]}, Endpoint(address="172.17.2.1"), 1, True),
        ({"from": [BLOCK]}, Endpoint(address="172.17.1.1"), 1, False),
        ({"ports": [SQL]}, Endpoint("other"), 6379, True),
        ({"ports": [SQL]}, Endpoint("other"), 6380, False),
        ({"ports": [SQL | {"endPort": 6390}]}, Endpoint("other"), 6380, True),
        ({"ports": [{"port": "sql"}]}, Endpoint("other"), 6379, True),
        ({"ports": [{"port": "http"}]}, Endpoint("other"), 6379, False),
        ({"ports": [{"protocol": "UDP"}]}, Endpoint("other"), 6379, False),
    ],
)
def test_ingress_as_kubernetes_documents_it(rule: dict[str, Any], source: Endpoint, port: int, allowed: bool) -> None:
    net = Network([policy(ingress=[rule])], {"alices": {"user": "alice"}})
    assert net.reaches(source, DB, port) is allowed
    assert net.reaches(source, Endpoint("default", {"role": "web"}), port), "no policy selects it"


def test_egress_counts_on_the_side_of_the_source() -> None:
    closed = Network([policy(policyTypes=["Ingress", "Egress"], egress=[{"to": [CLIENT], "ports": [SQL]}])])
    client = Endpoint("default", {"role": "client"})
    assert closed.reaches(DB, client, 6379)
    assert not closed.reaches(DB, client, 6380)
    assert not closed.reaches(DB, Endpoint("other"), 6379)
    assert not closed.reaches(client, DB, 6379), "its ingress is isolated, and no rule allows it"
    by_default = Network([policy(egress=[{"to": [CLIENT]}])])
    assert not by_default.reaches(DB, Endpoint("other"), 1), "a policy with egress rules is for egress, too"


@pytest.mark.parametrize(
    ("expression", "labels", "matched"),
    [
        ({"operator": "In", "values": ["a", "b"]}, {"k": "a"}, True),
        ({"operator": "In", "values": ["a"]}, {}, False),
        ({"operator": "NotIn", "values": ["a"]}, {}, True),
        ({"operator": "Exists"}, {"k": "x"}, True),
        ({"operator": "DoesNotExist"}, {"k": "x"}, False),
    ],
)
def test_expressions_of_selectors(expression: dict[str, Any], labels: dict[str, str], matched: bool) -> None:
    chosen = {"podSelector": {"matchExpressions": [{"key": "k", **expression}]}}
    net = Network([policy(ingress=[{"from": [chosen]}])])
    assert net.reaches(Endpoint("default", labels), DB, 1) is matched


def test_the_gateway_may_only_read_endpoint_slices() -> None:
    account, role, binding = gateway_access(resolved_pipeline())
    assert role["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}
    ]
    assert binding["subjects"][0]["name"] == account["metadata"]["name"] == "chat-gateway"
    assert "access.yaml" not in render(resolved_pipeline(gateway={"service_account": "mine"}))


def test_a_disruption_budget_selects_gateways_only() -> None:
    files = render(resolved_pipeline(gateway={"max_unavailable": 1}))
    (budget,) = files["disruption.yaml"]
    assert (budget["kind"], budget["spec"]["maxUnavailable"]) == ("PodDisruptionBudget", 1)
    selected = budget["spec"]["selector"]["matchLabels"]
    labels = [each["spec"]["template"]["metadata"]["labels"] for each in files["stage-0.yaml"] + files["gateway.yaml"]]
    assert [selected.items() <= each.items() for each in labels] == [False, True]
    assert "disruption.yaml" not in render(resolved_pipeline())
