"""Objects that decide who may reach, evict and change a pipeline: Roles, NetworkPolicies, a PodDisruptionBudget."""

from typing import Any, Final

from functions.configuration.config import FLEET_LABEL
from knative.render.resolved_pipeline import ResolvedPipeline, labels, pipeline_object
from knative.render.services import METRICS_PORT, QUEUE_PROXY, QUEUE_PROXY_TLS, gateway_service_account, pod_port
from knative.spec.kubernetes_object import KubernetesObject, kubernetes_object

RBAC: Final = "rbac.authorization.k8s.io"
DEPLOYER_ROLE: Final = "lamina-deployer"
_QUEUE_PROXY_STATS, _QUEUE_PROXY_METRICS = 9090, 9091  # ports for autoscaler and Prometheus
_SELECTING: Final = ("app.kubernetes.io/instance", "app.kubernetes.io/component")

_APPLIED: Final = ("create", "delete", "get", "list", "patch")
_WATCHED: Final = (*_APPLIED, "watch")
# API group, resources, verbs. tests/knative/cluster/test_deployer_role.py compares them with the requests that commands make.
_DEPLOYER_RULES: Final[tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = (
    ("serving.knative.dev", ("services",), _WATCHED),
    ("serving.knative.dev", ("configurations", "routes"), ("get",)),
    ("serving.knative.dev", ("revisions",), ("delete", "get", "list")),
    ("autoscaling.internal.knative.dev", ("podautoscalers",), ("list",)),
    ("eventing.knative.dev", ("brokers", "triggers"), _WATCHED),
    ("flows.knative.dev", ("sequences",), _WATCHED),
    ("sources.knative.dev", ("sinkbindings",), _WATCHED),
    ("monitoring.coreos.com", ("podmonitors", "prometheusrules"), _APPLIED),
    ("networking.k8s.io", ("networkpolicies",), _APPLIED),
    ("batch", ("jobs",), ("delete", "get", "list")),  # of `render --gitops`
    ("policy", ("poddisruptionbudgets",), _APPLIED),
    (RBAC, ("roles", "rolebindings"), _APPLIED),
    # Kubernetes lets a user grant only rights that the user has, and the gateway's Role grants this one.
    ("discovery.k8s.io", ("endpointslices",), ("get", "list", "watch")),
    ("", ("configmaps", "serviceaccounts"), _APPLIED),
    ("", ("secrets",), ("create", "delete", "get", "list", "update")),
    ("", ("pods", "events"), ("list",)),
    ("", ("pods/log", "namespaces"), ("get",)),
    ("coordination.k8s.io", ("leases",), ("create", "delete", "get", "list", "patch", "update")),
)


def deployer_role(namespace: str) -> KubernetesObject:
    """The Role that deploying a pipeline needs, whatever its spec. Rights on kinds that a cluster lacks do no harm."""
    rules = [
        {"apiGroups": [group], "resources": list(resources), "verbs": sorted(verbs)}
        for group, resources, verbs in _DEPLOYER_RULES
    ]
    return kubernetes_object(
        f"{RBAC}/v1", "Role", DEPLOYER_ROLE, namespace, {"app.kubernetes.io/part-of": "lamina"}, rules=rules
    )


def gateway_access(pipeline: ResolvedPipeline, lease: str | None = None) -> list[KubernetesObject]:
    """ServiceAccount, Role and RoleBinding that let the gateway read EndpointSlices of its namespace, and nothing else.

    The gateway of a fleet reads ConfigMaps, too, which name the fleet's members. lease: a Lease that it changes.
    """
    rules = [{"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}]
    if pipeline.fleet is not None:
        rules.append({"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list", "watch"]})
    if lease is not None:
        named = {"resourceNames": [lease], "verbs": ["get", "update"]}
        rules.append({"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], **named})
    return service_account_with_role(pipeline, gateway_service_account(pipeline.spec), "gateway", rules)


def service_account_with_role(
    pipeline: ResolvedPipeline, name: str, component: str, rules: list[KubernetesObject]
) -> list[KubernetesObject]:
    """A ServiceAccount, a Role with these rules, and the RoleBinding between them, all called `name`.

    component: the value of their component label.
    """
    role = {"apiGroup": RBAC, "kind": "Role", "name": name}
    subjects = [{"kind": "ServiceAccount", "name": name, "namespace": pipeline.spec.namespace}]
    return [
        pipeline_object(pipeline, "v1", "ServiceAccount", name, component),
        pipeline_object(pipeline, f"{RBAC}/v1", "Role", name, component, rules=rules),
        pipeline_object(pipeline, f"{RBAC}/v1", "RoleBinding", name, component, roleRef=role, subjects=subjects),
    ]


def disruption_budgets(pipeline: ResolvedPipeline) -> list[KubernetesObject]:
    """A PodDisruptionBudget for the gateway: how many pods a drained node may evict at once. Empty without `max_unavailable`.

    Stages have none: sequences leave a terminating pod by themselves, so a budget would only delay the drain.
    """
    most = pipeline.spec.gateway.max_unavailable
    if most is None:
        return []
    spec = {"maxUnavailable": most, "selector": _selector(pipeline, "gateway")}
    name = f"{pipeline.spec.name}-gateway"
    return [pipeline_object(pipeline, "policy/v1", "PodDisruptionBudget", name, "gateway", spec=spec)]


def network_policies(pipeline: ResolvedPipeline) -> list[KubernetesObject]:
    """One policy for the stages and one for the gateway. Both limit only ingress, so that the store and DNS stay reachable.

    Requests come through queue-proxy alone: on the function's own port they would not be counted. Stages call each other to
    hand over KV. Probes come from the node, which no policy blocks.
    """
    callers = [_peer("knative-serving", app="activator"), *map(_peer, pipeline.spec.network.ingress_namespaces)]
    if pipeline.spec.eventing is not None:
        # By default Eventing comes through the ingress; with a service mesh it comes from its own pods.
        callers.append(_peer("knative-eventing"))
    # With system-internal-tls they use the second port.
    requests = _allow(callers, QUEUE_PROXY, QUEUE_PROXY_TLS)
    own_ports = sorted({QUEUE_PROXY, pod_port(pipeline.spec)})  # both, while a deployment turns TLS on
    # No fingerprint in the selectors, because during a deployment the old gateway still uses the old stages.
    own = [{"podSelector": _selector(pipeline, component)} for component in ("gateway", "stage")]
    return [
        pipeline_object(
            pipeline,
            "networking.k8s.io/v1",
            "NetworkPolicy",
            f"{pipeline.spec.name}-{component}",
            component,
            spec={
                "podSelector": _selector(pipeline, component),
                "policyTypes": ["Ingress"],
                "ingress": [
                    *clients,
                    _allow([_peer("knative-serving", app="autoscaler")], _QUEUE_PROXY_STATS),
                    _allow([_peer(pipeline.spec.network.monitoring_namespace)], _QUEUE_PROXY_METRICS, METRICS_PORT),
                ],
            },
        )
        for component, clients in (("stage", [requests, _allow(own, *own_ports)]), ("gateway", [requests]))
    ]


def _allow(callers: list[KubernetesObject], *ports: int) -> KubernetesObject:
    return {"from": callers, "ports": [{"protocol": "TCP", "port": port} for port in ports]}


def _peer(namespace: str, **own_labels: str) -> dict[str, Any]:
    """Pods of a namespace as callers in a NetworkPolicy: those with these labels or, without labels, all of them."""
    peer: dict[str, Any] = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    return {**peer, "podSelector": {"matchLabels": own_labels}} if own_labels else peer


def _selector(pipeline: ResolvedPipeline, component: str) -> dict[str, Any]:
    """Label selector for all pods of one component of the pipeline, or of all of its fleet, whatever their fingerprint."""
    own = labels(pipeline, component)
    selecting = _SELECTING if pipeline.fleet is None else (FLEET_LABEL, _SELECTING[1])
    return {"matchLabels": {key: own[key] for key in selecting}}


def around_gateway(pipeline: ResolvedPipeline, lease: str | None = None) -> dict[str, list[KubernetesObject]]:
    """Objects that must exist before a gateway, by the file that `render` writes them to: access, network, disruption.

    lease: name of a Lease that the gateway may change.
    """
    files: dict[str, list[KubernetesObject]] = {}
    if pipeline.spec.gateway.service_account is None:
        files["access.yaml"] = gateway_access(pipeline, lease)
    if pipeline.spec.network.policies:
        files["network.yaml"] = network_policies(pipeline)
    if budgets := disruption_budgets(pipeline):
        files["disruption.yaml"] = budgets
    return files
