"""Knative's controllers for Services, Brokers, Triggers and Sequences: the steps that were seen on a cluster, one by one.

A behaviour is a generator: clients see what it does up to a `yield` before the next step. Until the first step the status is
that of the previous generation, which must not mislead a deployer.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.knative.kubernetes_api import KubernetesApi

Object = dict[str, Any]
Steps = Iterator[None]
Behaviour = Callable[["KubernetesApi", Object], Steps]

SERVICE = ("serving.knative.dev/v1", "services")
BROKER = ("eventing.knative.dev/v1", "brokers")
TRIGGER = ("eventing.knative.dev/v1", "triggers")
SEQUENCE = ("flows.knative.dev/v1", "sequences")
SINK_BINDING = ("sources.knative.dev/v1", "sinkbindings")
_STEP_SECONDS = 0.01
_OF_SERVICES = ("routes", "configurations", "revisions", "podautoscalers", "pods")  # in the order in which they are collected
_CLASS = "autoscaling.knative.dev/class"
_STATE = "serving.knative.dev/routingState"
_OUT_OF_DATE = "The Configuration is still working to reflect the latest desired specification."
_GATEWAY = "app.kubernetes.io/component"


class Controllers:
    """A thread that runs the next step of every object that changed."""

    def __init__(self, api: "KubernetesApi") -> None:
        self._api = api
        self._running: dict[tuple[str, str, str, str], Steps] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def reconcile(self, key: tuple[str, str, str, str]) -> None:
        if key[:2] in (SERVICE, *_CONDITIONS):
            play = become_ready if key[:2] == SERVICE else eventing_ready
            self._running[key] = self._api.behaviours.get(key[3], play)(self._api, self._api.objects[key])

    def deleted(self, key: tuple[str, str, str, str]) -> None:
        """Kubernetes' garbage collector removes the objects that it owned, later if `collection_held`."""
        self._running.pop(key, None)
        kind = {SERVICE[1]: "service", "revisions": "revision"}.get(key[1]) if key[0] == SERVICE[0] else None
        if kind is None:
            return
        owned = {f"serving.knative.dev/{kind}": key[3]}
        keys = [(self._api.key_of(each), each["metadata"]["uid"]) for p in _OF_SERVICES for each in self._api.found(p, owned)]
        if self._api.collection_held:
            self._running["garbage", *key[1:]] = self._collect(keys)
        else:
            list(self._collect(keys))

    def _collect(self, keys: list[tuple[tuple[str, str, str, str], str]]) -> Steps:
        while self._api.collection_held:
            yield
        for key, uid in keys:
            if key in self._api.objects and self._api.objects[key]["metadata"]["uid"] == uid:
                self._api.remove(*key)

    def end_old_pods(self) -> None:
        """Removes pods of gateway revisions without traffic, which the autoscaler scales to zero."""
        for pod in self._api.found("pods", {_GATEWAY: "gateway"}):
            labels = pod["metadata"]["labels"]
            service = self._api.objects.get((*SERVICE, pod["metadata"]["namespace"], labels["serving.knative.dev/service"]))
            over = pod["status"].get("phase") in ("Failed", "Succeeded")  # Kubernetes keeps evicted pods for hours
            if service and not over and _scales_to_zero(self._api, pod, service):
                self._api.remove(*self._api.key_of(pod))

    def _run(self) -> None:
        while not self._ended.wait(_STEP_SECONDS):
            for key, steps in list(self._running.items()):
                try:
                    with self._api.changed:
                        next(steps)
                except StopIteration:
                    if self._running.get(key) is steps:
                        del self._running[key]


# -- Services ---------------------------------------------------------------------------------------------------------


def become_ready(api: "KubernetesApi", service: Object) -> Steps:
    revision = yield from make_revision(api, service)
    add_pod(api, service, revision, {"state": {"running": {}}, "ready": True})
    set_conditions(
        api, service, revision, "Unknown", "IngressNotConfigured", "Ingress has not yet been reconciled.", routes=True
    )
    yield
    set_conditions(api, service, revision, "Unknown", "Uninitialized", "Waiting for load balancer to be ready", routes=True)
    yield
    route(api, service, revision)
    if not api.lingering_gateways:
        api.controllers.end_old_pods()


def never_ready(api: "KubernetesApi", service: Object) -> Steps:
    yield from make_revision(api, service)


def image_pull_fails(api: "KubernetesApi", service: Object) -> Steps:
    revision = yield from make_revision(api, service)
    waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "registry.example/lamina:missing"'}
    add_pod(api, service, revision, {"state": {"waiting": waiting}})


def crash_loops(api: "KubernetesApi", service: Object) -> Steps:
    revision = yield from make_revision(api, service)
    waiting = {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}
    ended = {"exitCode": 1, "reason": "Error"}
    status = {"state": {"waiting": waiting}, "lastState": {"terminated": ended}, "restartCount": 3}
    add_pod(api, service, revision, status)
    api.logs[f"{revision}-pod"] = "ERROR bucket 'lamina' does not exist\n"


def revision_fails(api: "KubernetesApi", service: Object) -> Steps:
    revision = yield from make_revision(api, service)
    namespace = service["metadata"]["namespace"]
    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{revision}.1", "namespace": namespace},
        "involvedObject": {"kind": "ReplicaSet", "name": f"{revision}-deployment-abc"},
        "type": "Warning",
        "reason": "FailedCreate",
        "message": "pods is forbidden: exceeded quota: requests.memory",
    }
    api.put(event)
    text = f'Revision "{revision}" failed with message: initial scale was never achieved.'
    set_conditions(api, service, revision, "False", "RevisionFailed", text)


def slow_to_look(api: "KubernetesApi", service: Object) -> Steps:
    """The controller sees the change only after a second; old pods go on crashing meanwhile."""
    restart_pods(api, service)
    for _ in range(100):
        yield
    yield from become_ready(api, service)


def slow_to_configure(api: "KubernetesApi", service: Object) -> Steps:
    """The Service's controller sees the change a second before the Configuration's does."""
    yield
    old = (api.objects[api.key_of(service)].get("status") or {}).get("latestCreatedRevisionName", "")
    _configure(api, service)
    set_conditions(api, service, old, "Unknown", "OutOfDate", _OUT_OF_DATE)
    restart_pods(api, service)
    for _ in range(100):
        yield
    yield from become_ready(api, service)


def restart_pods(api: "KubernetesApi", service: Object) -> None:
    """The kubelet tries once more."""
    for pod in api.found("pods", {"serving.knative.dev/service": service["metadata"]["name"]}):
        statuses = [{**each, "restartCount": each["restartCount"] + 1} for each in pod["status"]["containerStatuses"]]
        api.put({**pod, "status": {**pod["status"], "containerStatuses": statuses}})


def make_revision(api: "KubernetesApi", service: Object) -> Iterator[None]:
    """The Configuration sees the template and makes a Revision, unless it has one. Returns the Revision's name.

    As pkg/reconciler/service does, it waits while a Configuration or Route of that name belongs to a deleted Service. As
    pkg/reconciler/configuration does, it takes any Revision of its name and generation, even one of a deleted Configuration.
    """
    yield
    key, metadata = api.key_of(service), service["metadata"]
    yield from _await_ownership(api, service)
    _route_meanwhile(api, service)
    old = (api.objects[key].get("status") or {}).get("latestCreatedRevisionName", "")
    configuration = _configure(api, service)
    if configuration["metadata"]["generation"] == configuration["status"]["observedGeneration"]:
        return old
    set_conditions(api, service, old, "Unknown", "OutOfDate", _OUT_OF_DATE)
    yield
    template, generation = service["spec"]["template"], configuration["metadata"]["generation"]
    revision = template["metadata"].get("name") or f"{metadata['name']}-{generation:05d}"
    labels = {
        **template["metadata"].get("labels", {}),
        "serving.knative.dev/service": metadata["name"],
        "serving.knative.dev/configuration": metadata["name"],
        "serving.knative.dev/configurationGeneration": str(generation),
    }
    own = {"name": revision, "namespace": metadata["namespace"], "labels": labels | {_STATE: "active"}, "generation": 1}
    own["annotations"] = template["metadata"].get("annotations", {})
    owner = {"apiVersion": SERVICE[0], "kind": "Configuration", "name": metadata["name"], "controller": True}
    own["ownerReferences"] = [owner | {"uid": configuration["metadata"]["uid"]}]
    made: Object = {"apiVersion": SERVICE[0], "kind": "Revision", "metadata": own, "spec": template["spec"]}
    if api.key_of(made) not in api.objects:
        api.put(made)
    api.put({**configuration, "status": {"observedGeneration": generation, "latestCreatedRevisionName": revision}})
    text = f'Configuration "{metadata["name"]}" is waiting for a Revision to become ready.'
    set_conditions(api, service, revision, "Unknown", "RevisionMissing", text)
    yield
    return revision


def _await_ownership(api: "KubernetesApi", service: Object) -> Steps:
    metadata = service["metadata"]
    owner = api.objects[api.key_of(service)]["metadata"]["uid"]
    for kind, plural in (("Configuration", "configurations"), ("Route", "routes")):
        key = (SERVICE[0], plural, metadata["namespace"], metadata["name"])
        while key in api.objects and owner not in [
            each["uid"] for each in api.objects[key]["metadata"].get("ownerReferences", [])
        ]:
            text = f'There is an existing {kind} "{metadata["name"]}" that we do not own.'
            set_conditions(api, service, "", "False", "NotOwned", text, routes=kind == "Route")
            yield
    if key not in api.objects:
        own = _owned_by(api, service)
        api.put({"apiVersion": SERVICE[0], "kind": "Route", "metadata": own | {"generation": 1}, "spec": {}})


def _owned_by(api: "KubernetesApi", service: Object) -> Object:
    """Metadata of the Service's Route and Configuration."""
    live = api.objects[api.key_of(service)]["metadata"]
    owner = {"apiVersion": SERVICE[0], "kind": "Service", "name": live["name"], "uid": live["uid"], "controller": True}
    labels = {"serving.knative.dev/service": live["name"]}
    return {"name": live["name"], "namespace": live["namespace"], "labels": labels, "ownerReferences": [owner]}


def set_conditions(
    api: "KubernetesApi", service: Object, revision: str, status: str, reason: str, message: str, *, routes: bool = False
) -> None:
    """Sets Ready and its cause. routes: the cause is the Route, not the Configuration."""
    live = api.objects.get(api.key_of(service))
    if live is None:
        return
    conditions = [
        _condition("ConfigurationsReady", "True" if routes else status, reason, message),
        _condition("Ready", status, reason, message),
        _condition("RoutesReady", status if routes else "Unknown", reason, message),
    ]
    old = live.get("status") or {}
    names = {"latestCreatedRevisionName": revision} if revision else {}
    generation = service["metadata"]["generation"]
    api.set_status(api.key_of(service), {**old, "conditions": conditions, "observedGeneration": generation, **names})


def route(api: "KubernetesApi", service: Object, revision: str) -> None:
    """Ready, with the traffic of the Service's spec; failed if that names a Revision that does not exist."""
    metadata = service["metadata"]
    traffic = [dict(each) for each in service["spec"].get("traffic") or [{"latestRevision": True, "percent": 100}]]
    for each in traffic:
        each.setdefault("revisionName", revision)
        if (*SERVICE[:1], "revisions", metadata["namespace"], each["revisionName"]) not in api.objects:
            text = f'Revision "{each["revisionName"]}" referenced in traffic not found.'
            set_conditions(api, service, revision, "False", "RevisionMissing", text, routes=True)
            return
    visibility = service["metadata"].get("labels", {}).get("networking.knative.dev/visibility")
    domain = "svc.cluster.local" if visibility == "cluster-local" else api.domain
    status = {
        "address": {"url": f"http://{metadata['name']}.{metadata['namespace']}.svc.cluster.local"},
        "conditions": [_condition(kind, "True") for kind in ("ConfigurationsReady", "Ready", "RoutesReady")],
        "latestCreatedRevisionName": revision,
        "latestReadyRevisionName": revision,
        "observedGeneration": metadata["generation"],
        "traffic": traffic,
        "url": f"http://{metadata['name']}.{metadata['namespace']}.{domain}",
    }
    api.set_status(api.key_of(service), status)
    live = api.objects[api.key_of(service)]
    for each in api.found("revisions", {"serving.knative.dev/service": metadata["name"]}):
        name, own = each["metadata"]["name"], each["metadata"]
        routed = name == revision or name in _revisions_with_traffic(live) | api.routed_elsewhere
        state = "active" if routed else "reserve"  # by pkg/reconciler/labeler
        ready = {"conditions": [_condition("Ready", "True")], "observedGeneration": 1}
        status = ready if name == revision else each.get("status", {})
        api.put({**each, "metadata": own | {"labels": own["labels"] | {_STATE: state}}, "status": status})
    for pod in api.found("pods", {"serving.knative.dev/service": metadata["name"], _GATEWAY: "stage"}):
        if _scales_to_zero(api, pod, live):
            api.remove(*api.key_of(pod))


def _scales_to_zero(api: "KubernetesApi", pod: Object, service: Object) -> bool:
    """Whether the pod's revision gets no requests, and the autoscaler scales it to zero.

    An HPA keeps one pod; a revision that was never Ready keeps its pods until its progress deadline.
    """
    name = pod["metadata"]["labels"]["serving.knative.dev/revision"]
    revision = api.objects.get((SERVICE[0], "revisions", pod["metadata"]["namespace"], name))
    if name in _revisions_with_traffic(service):
        return False
    if revision is None:
        return True
    hpa = revision["metadata"]["annotations"].get(_CLASS, "").startswith("hpa.")
    return not hpa and bool(revision.get("status"))


def _route_meanwhile(api: "KubernetesApi", service: Object) -> None:
    """The Route follows the Service at once: until the new revision is ready, `latestRevision` is the previous one."""
    status = (api.objects.get(api.key_of(service)) or {}).get("status") or {}
    latest = status.get("latestReadyRevisionName")
    if latest:
        traffic = [{"revisionName": latest, **each} for each in service["spec"].get("traffic") or []]
        api.set_status(api.key_of(service), {**status, "traffic": traffic})


def add_pod(api: "KubernetesApi", service: Object, revision: str, container_status: Object, phase: str = "Running") -> None:
    labels = {
        **service["spec"]["template"]["metadata"].get("labels", {}),
        "serving.knative.dev/revision": revision,
        "serving.knative.dev/service": service["metadata"]["name"],
    }
    metadata = {"name": f"{revision}-pod", "namespace": service["metadata"]["namespace"], "labels": labels}
    container = {**service["spec"]["template"]["spec"]["containers"][0]}
    status = {
        "phase": phase,
        "startTime": "2026-01-01T00:00:00Z",
        "containerStatuses": [
            {"name": container.get("name", "user-container"), "restartCount": 0, "ready": False, **container_status},
            {"name": "queue-proxy", "restartCount": 0, "ready": bool(container_status.get("ready")), "state": {"running": {}}},
        ],
    }
    account = service["spec"]["template"]["spec"].get("serviceAccountName", "default")
    spec = {
        "serviceAccountName": account,
        "containers": [{"name": "user-container", **container}, {"name": "queue-proxy", "resources": {}}],
    }
    api.put({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status})
    scaler = {"name": revision, "namespace": service["metadata"]["namespace"], "labels": labels}
    api.put(
        {
            "apiVersion": "autoscaling.internal.knative.dev/v1alpha1",
            "kind": "PodAutoscaler",
            "metadata": scaler,
            "status": {"desiredScale": 1, "actualScale": int(bool(container_status.get("ready")))},
        }
    )


def _configure(api: "KubernetesApi", service: Object) -> Object:
    """Updates the Configuration; its generation counts templates, not changes of traffic."""
    metadata, template = service["metadata"], service["spec"]["template"]
    old = api.objects.get((SERVICE[0], "configurations", metadata["namespace"], metadata["name"]))
    if old is not None and old["spec"]["template"] == template:
        return old
    own = _owned_by(api, service) | {"generation": old["metadata"]["generation"] + 1 if old else 1}
    if old is not None:
        own["uid"] = old["metadata"]["uid"]
    status = (old or {}).get("status") or {"observedGeneration": 0}
    return api.put(
        {"apiVersion": SERVICE[0], "kind": "Configuration", "metadata": own, "spec": {"template": template}, "status": status}
    )


def _revisions_with_traffic(service: Object) -> set[str]:
    status = service.get("status") or {}
    return {each["revisionName"] for each in status.get("traffic") or []}


# -- Eventing ---------------------------------------------------------------------------------------------------------


_CONDITIONS = {
    BROKER: ("Addressable", "DeadLetterSinkResolved", "FilterReady", "IngressReady", "Ready", "TriggerChannelReady"),
    TRIGGER: ("BrokerReady", "DeadLetterSinkResolved", "DependencyReady", "Ready", "SubscriberResolved", "SubscriptionReady"),
    SEQUENCE: ("Addressable", "ChannelsReady", "Ready", "SubscriptionsReady"),
    SINK_BINDING: ("OIDCIdentityCreated", "Ready", "SinkProvided"),
}


def broker_fails(api: "KubernetesApi", broker: Object) -> Steps:
    """A Broker of a class that has no controller."""
    if broker["kind"] != "Broker":
        yield from become_ready(api, broker)  # the gateway has the same name
        return
    yield
    reason = ("BrokerClass", "no controller looks after this class")
    conditions = [
        _condition("Addressable", "Unknown"),
        *(_condition(each, "False", *reason) for each in ("IngressReady", "Ready")),
    ]
    api.set_status(api.key_of(broker), {"conditions": conditions, "observedGeneration": broker["metadata"]["generation"]})


def eventing_ready(api: "KubernetesApi", manifest: Object) -> Steps:
    """Unknown, then False for a moment, then Ready unless it names an object that does not exist."""
    key = api.key_of(manifest)
    types = _CONDITIONS[key[:2]]
    generation = manifest["metadata"]["generation"]
    yield
    yield
    api.set_status(key, {"conditions": [_condition(each, "Unknown") for each in types], "observedGeneration": generation})
    yield
    coming = [_condition(each, "False", "NotReady", "the deployment is not available yet") for each in types]
    api.set_status(key, {"conditions": coming, "observedGeneration": generation})
    yield
    missing = next((ref for ref in _references(manifest["spec"]) if not _exists(api, manifest, ref)), None)
    conditions = [_condition(each, "True") for each in types]
    if missing is not None:
        group = missing["apiVersion"].split("/")[0]
        text = f'{missing["kind"].lower()}s.{group} "{missing["name"]}" not found'
        reason = "Unable to get the dead letter sink's URI"
        conditions = [
            _condition(each, "False", reason, text) if each in ("Ready", "DeadLetterSinkResolved") else _condition(each, "True")
            for each in types
        ]
    address = {"address": {"url": f"http://broker-ingress.example/{key[2]}/{key[3]}"}} if key[:2] == BROKER else {}
    api.set_status(key, {"conditions": conditions, "observedGeneration": generation, **address})


def _references(value: Any) -> Iterator[Object]:
    if isinstance(value, dict):
        if "ref" in value:
            yield value["ref"]
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _exists(api: "KubernetesApi", manifest: Object, ref: Object) -> bool:
    with contextlib.suppress(KeyError):
        plural = api.kinds[ref["apiVersion"]][ref["kind"]]
        return (ref["apiVersion"], plural, manifest["metadata"]["namespace"], ref["name"]) in api.objects
    return False


def _condition(kind: str, status: str, reason: str = "", message: str = "") -> Object:
    condition = {"type": kind, "status": status, "lastTransitionTime": "2026-01-01T00:00:00Z"}
    return condition if status == "True" or not reason else {**condition, "reason": reason, "message": message}
