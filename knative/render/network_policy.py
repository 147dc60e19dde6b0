"""Who may reach a pipeline's pods: Knative's own components on the ports that they need, the gateway, stages each other (keys
and values go from pod to pod), Prometheus; nobody else.

The ports are queue-proxy's, and the function's for metrics: 8012 takes requests, 9090 answers the autoscaler, 9091 and 9464 are
for Prometheus. Where the function takes requests nobody comes in from outside the pod; nobody would count them.
Probes come from the node, which no policy keeps out.
"""

from typing import Any, Final

from knative.render.resolved_pipeline import ResolvedPipeline, labels
from knative.render.services import METRICS_PORT
from knative.spec.kubernetes_object import KubernetesObject

_REQUESTS, _AUTOSCALER, _METRICS = 8012, 9090, 9091
_KNATIVE: Final = "knative-serving"
_EVENTING: Final = "knative-eventing"
_SELECTING: Final = ("app.kubernetes.io/instance", "app.kubernetes.io/component")


def network_policies(pipeline: ResolvedPipeline) -> list[KubernetesObject]:
    """One policy for the stages, one for the gateway. Only ingress is limited: the store and DNS stay reachable."""
    from_outside = [_pods(_KNATIVE, app="activator"), _namespace(pipeline.spec.network.ingress_namespace)]
    to_stage, to_gateway = [*from_outside, _own(pipeline, "gateway"), _own(pipeline, "stage")], from_outside
    if pipeline.spec.eventing is not None:
        # By default Eventing comes through the ingress; with a service mesh it comes from its own pods.
        to_stage, to_gateway = [*to_stage, _namespace(_EVENTING)], [*to_gateway, _namespace(_EVENTING)]
    return [_policy(pipeline, "stage", to_stage), _policy(pipeline, "gateway", to_gateway)]


def _policy(pipeline: ResolvedPipeline, component: str, callers: list[KubernetesObject]) -> KubernetesObject:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": f"{pipeline.spec.name}-{component}",
            "namespace": pipeline.spec.namespace,
            "labels": labels(pipeline, component),
        },
        "spec": {
            "podSelector": _selector(pipeline, component),
            "policyTypes": ["Ingress"],
            "ingress": [
                _allow(callers, _REQUESTS),
                _allow([_pods(_KNATIVE, app="autoscaler")], _AUTOSCALER),
                _allow([_namespace(pipeline.spec.network.monitoring_namespace)], _METRICS, METRICS_PORT),
            ],
        },
    }


def _allow(callers: list[KubernetesObject], *ports: int) -> KubernetesObject:
    return {"from": callers, "ports": [{"protocol": "TCP", "port": port} for port in ports]}


def _namespace(name: str) -> dict[str, Any]:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _pods(namespace: str, **own_labels: str) -> dict[str, Any]:
    return {**_namespace(namespace), "podSelector": {"matchLabels": own_labels}}


def _own(pipeline: ResolvedPipeline, component: str) -> dict[str, Any]:
    """Of any version of this pipeline: during a change the old gateway still drives the old stages."""
    return {"podSelector": _selector(pipeline, component)}


def _selector(pipeline: ResolvedPipeline, component: str) -> dict[str, Any]:
    own = labels(pipeline, component)
    return {"matchLabels": {key: own[key] for key in _SELECTING}}
