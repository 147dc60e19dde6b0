"""A PodDisruptionBudget for the gateway: how many of its pods a drained node may take at once.

Stages have none: sequences leave a terminating pod by themselves, and a budget would only hold up the drain.
"""

from knative.render.resolved_pipeline import ResolvedPipeline, labels
from knative.spec.kubernetes_object import KubernetesObject


def disruption_budgets(pipeline: ResolvedPipeline) -> list[KubernetesObject]:
    """None unless the spec says how many."""
    most = pipeline.spec.gateway.max_unavailable
    if most is None:
        return []
    own = labels(pipeline, "gateway")
    selected = ("app.kubernetes.io/instance", "app.kubernetes.io/component")
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": f"{pipeline.spec.name}-gateway", "namespace": pipeline.spec.namespace, "labels": own},
            "spec": {"maxUnavailable": most, "selector": {"matchLabels": {name: own[name] for name in selected}}},
        }
    ]
