"""The NetworkPolicies let Knative work, and nobody else in."""

from knative.render.access import network_policies
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import CONTAINER_PORT, METRICS_PORT, gateway_service, stage_service
from tests.support.knative.pipelines import resolved_pipeline


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


def test_requests_come_from_the_activator_the_ingress_and_for_stages_the_gateway_and_stages() -> None:
    stage, gateway = network_policies(pipeline())
    assert [namespace(peer) for peer in reachable(stage, 8012)] == ["knative-serving", "kourier-system", "own", "own"]
    assert [namespace(peer) for peer in reachable(gateway, 8012)] == ["knative-serving", "kourier-system"]
    for peer, service in zip(
        reachable(stage, 8012)[-2:], (gateway_service(pipeline()), stage_service(pipeline(), 0)), strict=True
    ):
        own = peer["podSelector"]["matchLabels"]
        assert own.items() <= service["spec"]["template"]["metadata"]["labels"].items()


def test_the_autoscaler_and_prometheus_read_their_ports_only() -> None:
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
