"""What whoever deploys a pipeline must be allowed to do in its namespace: a Role, rendered for whoever grants it.

tests/knative/cluster/test_deployer_role.py holds it to what the commands ask of an API, right by right.
"""

from typing import Final

from knative.spec.kubernetes_object import KubernetesObject

NAME: Final = "lamina-deployer"
_APPLIED: Final = ("create", "delete", "get", "list", "patch")
_WAITED_FOR: Final = (*_APPLIED, "watch")
_RULES: Final[tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = (
    ("serving.knative.dev", ("services",), _WAITED_FOR),
    ("serving.knative.dev", ("configurations",), ("get",)),
    ("serving.knative.dev", ("revisions",), ("get", "list")),
    ("autoscaling.internal.knative.dev", ("podautoscalers",), ("list",)),
    ("eventing.knative.dev", ("brokers", "triggers"), _WAITED_FOR),
    ("flows.knative.dev", ("sequences",), _WAITED_FOR),
    ("monitoring.coreos.com", ("podmonitors", "prometheusrules"), _APPLIED),
    ("networking.k8s.io", ("networkpolicies",), _APPLIED),
    ("batch", ("jobs",), ("delete", "get", "list")),  # of `render --gitops`
    ("policy", ("poddisruptionbudgets",), _APPLIED),
    ("rbac.authorization.k8s.io", ("roles", "rolebindings"), _APPLIED),
    # Nobody may grant what they do not have, and the gateway's Role grants this.
    ("discovery.k8s.io", ("endpointslices",), ("get", "list", "watch")),
    ("", ("configmaps", "serviceaccounts"), _APPLIED),
    ("", ("secrets",), ("create", "delete", "get", "list", "update")),
    ("", ("pods", "events"), ("list",)),
    ("", ("pods/log", "namespaces"), ("get",)),
    ("coordination.k8s.io", ("leases",), ("create", "delete", "get", "update")),
)
"""API group, resources, verbs."""


def deployer_role(namespace: str) -> KubernetesObject:
    """For a spec with any sections; rights on what a cluster does not serve do no harm."""
    rules = [{"apiGroups": [group], "resources": list(resources), "verbs": sorted(verbs)} for group, resources, verbs in _RULES]
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": NAME, "namespace": namespace, "labels": {"app.kubernetes.io/part-of": "lamina"}},
        "rules": rules,
    }
