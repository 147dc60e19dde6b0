"""Whether Knative has made what was asked of it. Services, Brokers, Triggers and Sequences all say it the same way."""

from dataclasses import dataclass
from typing import Any, Final

from knative.cluster.client import Cluster, Ref
from knative.cluster.errors import NotPermitted
from knative.spec.kubernetes_object import KubernetesObject

SERVING: Final = "serving.knative.dev/v1"
SERVICE_LABEL: Final = "serving.knative.dev/service"
REVISION_LABEL: Final = "serving.knative.dev/revision"


@dataclass(frozen=True, slots=True)
class Readiness:
    """Of one object: `ready` True, False (it failed) or None (not known yet), with Knative's own reason."""

    ready: bool | None
    reason: str = ""

    @property
    def word(self) -> str:
        return {True: "yes", False: "no", None: "not yet"}[self.ready]


def readiness(manifest: KubernetesObject) -> Readiness:
    """As of the generation that was applied last; a condition of an older one says nothing."""
    if not observed(manifest):
        return Readiness(None, "not seen by Knative yet")
    condition = condition_of(manifest, "Ready")
    reason = ": ".join(part for part in (condition.get("reason"), condition.get("message")) if part)
    return Readiness({"True": True, "False": False}.get(condition.get("status", "")), reason)


def observed(manifest: KubernetesObject) -> bool:
    """Whether the status is of the generation that was applied last."""
    return bool((manifest.get("status") or {}).get("observedGeneration") == manifest["metadata"].get("generation"))


def condition_of(manifest: KubernetesObject, kind: str) -> dict[str, Any]:
    conditions = (manifest.get("status") or {}).get("conditions") or []
    return next((condition for condition in conditions if condition.get("type") == kind), {})


def newest_revision(cluster: Cluster, service: KubernetesObject) -> str | None:
    """Name of the Revision of the template that was applied last; None until Knative has made it.

    The Service's controller sees a change before the Configuration's does, and names the Revision before it meanwhile.
    """
    if not observed(service):
        return None
    namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
    try:
        configuration = cluster.get(Ref(SERVING, "Configuration", namespace, name))
    except NotPermitted:
        return None if condition_of(service, "Ready").get("reason") == "OutOfDate" else _latest(service)
    return _latest(configuration) if configuration is not None and observed(configuration) else None


def _latest(manifest: KubernetesObject) -> str | None:
    return (manifest.get("status") or {}).get("latestCreatedRevisionName") or None


def traffic_of(service: KubernetesObject) -> dict[str, int]:
    """Revision → percent of the requests that it gets, as Knative has it now; one that has a tag alone is there with 0."""
    percents: dict[str, int] = {}
    for each in (service.get("status") or {}).get("traffic") or []:
        name = each.get("revisionName", "")
        percents[name] = percents.get(name, 0) + int(each.get("percent") or 0)
    return percents
