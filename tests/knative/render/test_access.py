"""NetworkPolicies admit Knative's own traffic and no other; Roles and budgets are minimal."""

from knative.render.access import gateway_access, network_policies
from knative.render.rendering import render
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import CONTAINER_PORT, METRICS_PORT, gateway_service, stage_service
from tests.support.knative.manifests import resolved_pipeline


def pipeline() -> ResolvedPipeline:
    return resolved_pipeline(network={"monitoring_namespace": "observability"})


def reachable(policy: dict, port: int) -> list[dict]:  # type: ignore[type-arg]
    return [
        caller
        for rule in policy["spec"]["ingress"]
        for caller in rule["from"]
        if port in [each["port"] for each in rule["ports"]]
    ]


def namespace(peer: dict) -> str:  # type: ignore[type-arg]
    return peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name", "own")


def test_policies_select_the_pods_of_the_rendered_services() -> None:
    stage, gateway = network_policies(pipeline())
    for policy, service in ((stage, stage_service(pipeline(), 1)), (gateway, gateway_service(pipeline()))):
        pod_labels = service["spec"]["template"]["metadata"]["labels"]
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod_labels.items()
    assert stage["spec"]["podSelector"] != gateway["spec"]["podSelector"]


def test_requests_come_from_knative_and_for_stages_from_the_pipeline_itself() -> None:
    stage, gateway = network_policies(pipeline())
    assert [namespace(peer) for peer in reachable(stage, 8012)] == ["knative-serving", "kourier-system", "own", "own"]
    assert [namespace(peer) for peer in reachable(gateway, 8012)] == ["knative-serving", "kourier-system"]
    for peer, service in zip(
        reachable(stage, 8012)[-2:], (gateway_service(pipeline()), stage_service(pipeline(), 0)), strict=True
    ):
        own = peer["podSelector"]["matchLabels"]
        assert own.items() <= service["spec"]["template"]["metadata"]["labels"].items()


def test_the_autoscaler_and_prometheus_reach_only_their_ports() -> None:
    for policy in network_policies(pipeline()):
        assert reachable(policy, 9090) == [
            {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "knative-serving"}},
                "podSelector": {"matchLabels": {"app": "autoscaler"}},
            }
        ]
        assert [namespace(peer) for peer in reachable(policy, 9091)] == ["observability"]
        assert [namespace(peer) for peer in reachable(policy, METRICS_PORT)] == ["observability"]
        assert reachable(policy, CONTAINER_PORT) == []
        assert policy["spec"]["policyTypes"] == ["Ingress"]


def test_the_gateway_may_only_read_endpoint_slices() -> None:
    account, role, binding = gateway_access(pipeline())
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
