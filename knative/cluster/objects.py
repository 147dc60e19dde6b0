"""Labels and status of a pipeline's objects: readiness, traffic, revisions, pods."""

from dataclasses import dataclass
from typing import Any, Final

from functions.configuration.config import FLEET_LABEL, PERCENT
from knative.cluster.client import Cluster, Ref
from knative.cluster.errors import NotPermitted
from knative.spec.kubernetes_object import KubernetesObject

SERVING: Final = "serving.knative.dev/v1"
SERVICE_LABEL: Final = "serving.knative.dev/service"
REVISION_LABEL: Final = "serving.knative.dev/revision"
INSTANCE: Final = "app.kubernetes.io/instance"
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
COMPONENT: Final = "app.kubernetes.io/component"
PIPELINE: Final = "lamina.dev/pipeline"
FLEET: Final = FLEET_LABEL
_SIDECAR: Final = "queue-proxy"


def own_selector(name: str) -> str:
    """Label selector of everything that Lamina made for the pipeline."""
    return f"{INSTANCE}={name},{MANAGED_BY}=lamina"


def label(manifest: KubernetesObject, name: str) -> str:
    return str((manifest["metadata"].get("labels") or {}).get(name, ""))


def gateway_of(objects: list[KubernetesObject]) -> KubernetesObject:
    """The gateway's Service; of a fleet's member the ConfigMap from which the fleet's gateways learn of it."""
    kinds = ("Service", "ConfigMap")
    return next(each for each in objects if each["kind"] in kinds and label(each, COMPONENT) == "gateway")


def is_member(gateway: KubernetesObject) -> bool:
    """Whether what `gateway_of` returned belongs to a member of a fleet."""
    return bool(gateway["kind"] == "ConfigMap")


def canary_config_map(gateway: KubernetesObject, percent: int) -> KubernetesObject:
    """A member's ConfigMap as its canary's, which gets `percent` of the member's requests."""
    metadata = gateway["metadata"]
    name, annotations = f"{metadata['name']}-canary", {PERCENT: str(percent)}
    return {**gateway, "metadata": {**metadata, "name": name, "annotations": annotations}}


def fingerprint_of(manifest: KubernetesObject) -> str:
    return str(manifest["metadata"]["labels"][PIPELINE])


@dataclass(frozen=True, slots=True)
class ReadyCondition:
    """Condition Ready of a Knative object. ready: True, False (failed) or None (not known yet)."""

    ready: bool | None
    reason: str = ""  # reason and message as Knative gives them


def readiness(manifest: KubernetesObject) -> ReadyCondition:
    """Condition Ready of a Service, Broker, Trigger or Sequence.

    It is unknown as long as Knative has not seen the latest change of the object.
    """
    if not observed(manifest):
        return ReadyCondition(None, "not seen by Knative yet")
    condition = _ready_condition(manifest)
    reason = ": ".join(part for part in (condition.get("reason"), condition.get("message")) if part)
    return ReadyCondition({"True": True, "False": False}.get(condition.get("status", "")), reason)


def observed(manifest: KubernetesObject) -> bool:
    """Whether the status belongs to the latest change of the object, rather than to an earlier generation."""
    return bool((manifest.get("status") or {}).get("observedGeneration") == manifest["metadata"].get("generation"))


def failed_conditions(manifest: KubernetesObject) -> list[str]:
    """Lines about conditions that are not True, one for each message. Those of severity Info, such as Active, are left out."""
    types: dict[str, list[str]] = {}
    for each in _conditions(manifest):
        if each.get("status") != "True" and each.get("severity") != "Info" and each.get("message"):
            types.setdefault(f"{each.get('reason', '')}: {each['message']}", []).append(each["type"])
    return [f"{', '.join(names)} {text}" for text, names in types.items()]


def not_owned(manifest: KubernetesObject) -> bool:
    """Whether Knative finds an object of the name that it needs, such as a Route, which belongs to another owner."""
    return any(each.get("status") == "False" and each.get("reason") == "NotOwned" for each in _conditions(manifest))


def _ready_condition(manifest: KubernetesObject) -> dict[str, Any]:
    return next((each for each in _conditions(manifest) if each.get("type") == "Ready"), {})


def _conditions(manifest: KubernetesObject) -> list[dict[str, Any]]:
    return (manifest.get("status") or {}).get("conditions") or []


def newest_revision(cluster: Cluster, service: KubernetesObject) -> str | None:
    """Name of the Revision that belongs to the Service's current template; None until Knative has made it.

    Reads the Configuration: the Service's status may still name the previous Revision for a moment after a change.
    """
    if not observed(service):
        return None
    namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
    try:
        source = cluster.get(Ref(SERVING, "Configuration", namespace, name))
    except NotPermitted:
        source = None if _ready_condition(service).get("reason") == "OutOfDate" else service
    if source is None or not observed(source):
        return None
    return (source.get("status") or {}).get("latestCreatedRevisionName") or None


def newest_pods(cluster: Cluster, service: KubernetesObject) -> list[KubernetesObject]:
    """Pods of the Service's newest revision; empty if Knative has not made it yet. Raises NotPermitted."""
    revision = newest_revision(cluster, service)
    if revision is None:
        return []
    return cluster.find("v1", "Pod", service["metadata"]["namespace"], f"{REVISION_LABEL}={revision}")


def traffic_of(service: KubernetesObject) -> dict[str, int]:
    """Name of each revision in the Service's status → percent of the requests that it gets.

    A revision that has only a tag gets 0.
    """
    percents: dict[str, int] = {}
    for each in (service.get("status") or {}).get("traffic") or []:
        name = each.get("revisionName", "")
        percents[name] = percents.get(name, 0) + int(each.get("percent") or 0)
    return percents


def routed_revisions(service: KubernetesObject) -> set[str]:
    """Names of the revisions that a Service's spec or status sends requests to, even if only by a tag."""
    return set(traffic_of(service)) | {each.get("revisionName", "") for each in service["spec"].get("traffic") or []}


def services_of(cluster: Cluster, namespace: str, name: str) -> list[KubernetesObject]:
    """The pipeline's Services: the gateway first, then the others by name."""
    found = cluster.find(SERVING, "Service", namespace, own_selector(name))
    return sorted(found, key=lambda service: (service["metadata"]["name"] != name, service["metadata"]["name"]))


def phase_of(pod: KubernetesObject) -> str:
    """Phase of a pod: `ready`, `starting`, `leaving` (it terminates) or `over` (it has ended or was evicted)."""
    status = pod.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed"):
        return "over"
    if pod["metadata"].get("deletionTimestamp"):
        return "leaving"
    containers = container_statuses(pod)
    return "ready" if containers and all(each.get("ready") for each in containers) else "starting"


def container_statuses(pod: KubernetesObject) -> list[dict[str, Any]]:
    return (pod.get("status") or {}).get("containerStatuses") or []


def function_container(pod: KubernetesObject) -> str:
    """Name of the function's container, whatever it is called; the other one is Knative's queue-proxy."""
    names: list[str] = [container["name"] for container in pod["spec"]["containers"]]
    return next((name for name in names if name != _SIDECAR), names[0])
