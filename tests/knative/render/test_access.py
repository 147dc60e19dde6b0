"""Roles and budgets are minimal. test_network_policies.py has who may reach whom."""

from knative.render.access import gateway_access
from knative.render.rendering import render
from tests.support.knative.manifests import resolved_pipeline


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
