"""A stand-in for the Kubernetes API of a cluster with Knative, over real HTTP, as far as a deployer can see it.

This file is the API server: objects with uid, generation and managed fields, lists, watches, server-side apply, create and
replace, deletion with finalizers and preconditions, dry runs, logs, Status objects. admission.py decides what is admitted,
knative_controllers.py acts as Knative's controllers.

**It answers unknown requests with 501, and then `close` fails the test.**
"""

import copy
import itertools
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from flask import Flask, Response, request
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.support.knative.admission import refusal, unknown_fields
from tests.support.knative.knative_controllers import BROKER, SEQUENCE, SERVICE, TRIGGER, Behaviour, Controllers
from tests.support.knative.server_side_apply import Object, Owners, conflicts, managed_fields, merged, taken_over

Key = tuple[str, str, str, str]  # apiVersion, plural, namespace, name

KINDS: dict[str, dict[str, str]] = {
    "v1": {
        "Secret": "secrets",
        "ConfigMap": "configmaps",
        "ServiceAccount": "serviceaccounts",
        "Pod": "pods",
        "Event": "events",
        "Namespace": "namespaces",
    },
    "apps/v1": {"Deployment": "deployments"},
    "coordination.k8s.io/v1": {"Lease": "leases"},
    "batch/v1": {"Job": "jobs"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "rbac.authorization.k8s.io/v1": {"Role": "roles", "RoleBinding": "rolebindings"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies"},
    "serving.knative.dev/v1": {
        "Service": "services",
        "Route": "routes",
        "Configuration": "configurations",
        "Revision": "revisions",
    },
    "autoscaling.internal.knative.dev/v1alpha1": {"PodAutoscaler": "podautoscalers"},
}
EVENTING = {
    "eventing.knative.dev/v1": {"Broker": "brokers", "Trigger": "triggers"},
    "flows.knative.dev/v1": {"Sequence": "sequences"},
    "sources.knative.dev/v1": {"SinkBinding": "sinkbindings"},
}
_WITHOUT_GENERATION = ("v1", "rbac.authorization.k8s.io/v1", "coordination.k8s.io/v1")
_QUERY = {
    *("labelSelector", "watch", "timeoutSeconds", "fieldManager", "force", "dryRun", "resourceVersion", "pretty"),
    *("container", "tailLines", "previous", "follow", "allowWatchBookmarks"),
}
_REASONS = {400: "BadRequest", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 422: "Invalid", 501: "NotImplemented"}


class _Quiet(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None: ...


class KubernetesApi:
    """Serves on a loopback port from construction until `close`."""

    def __init__(self) -> None:
        self.kinds = copy.deepcopy(KINDS)
        self.objects: dict[Key, Object] = {}
        self.owners: dict[Key, Owners] = {}
        self.behaviours: dict[str, Behaviour] = {}  # by name of an object; others become Ready
        self.forbidden: set[tuple[str, str]] = set()  # (verb, plural)
        self.forbidden_everywhere = False  # only single namespaces may be listed
        self.enabled: set[str] = set()  # fields whose feature flag is on
        self.quota_message: str | None = None
        self.domain = "example"  # of URLs of Services that are not cluster-local
        self.logs: dict[str, str] = {}
        self.on_change: Callable[[Key], object] = lambda _: None  # called after every change
        self.applied: list[str] = []
        self.calls: set[tuple[str, str, str, str]] = set()  # (verb, API group, resource, namespace) of all requests
        self.unknown: list[str] = []  # requests that a real API may know and this one does not
        self.stages_scale_to_zero = False  # when the pods of one Service are listed next
        self.lingering_gateways = 0  # number of pod lists that still show pods of a replaced gateway
        self.routed_elsewhere: set[str] = set()  # revisions that a Route of no Service uses
        self.collection_held = False  # the garbage collector removes nothing yet
        self._version = itertools.count(1)
        self.changed = threading.Condition()
        self.controllers = Controllers(self)
        self.add_namespace("default")
        self._server = make_server("127.0.0.1", 0, self._app(), threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Raises AssertionError if there were unknown requests."""
        self.controllers.close()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        assert not self.unknown, f"the stand-in does not know: {self.unknown}"

    # -- Changes by tests and controllers, without checks ------------------------------------------------------------------

    def put(self, manifest: Object) -> Object:
        """Writes an object, as a controller would."""
        key = self.key_of(manifest)
        with self.changed:
            metadata = {"uid": str(uuid.uuid4()), "creationTimestamp": "2026-01-01T00:00:00Z", **manifest["metadata"]}
            metadata["resourceVersion"] = str(next(self._version))
            self.objects[key] = {**manifest, "metadata": metadata}
            self.on_change(key)
            self.changed.notify_all()
            return self.objects[key]

    def set_status(self, key: Key, status: Object) -> None:
        """Does nothing if the object is gone."""
        with self.changed:
            if key in self.objects:
                self.put({**self.objects[key], "status": status})

    def remove(self, api_version: str, plural: str, namespace: str, name: str) -> None:
        with self.changed:
            self.objects.pop((api_version, plural, namespace, name), None)
            self.owners.pop((api_version, plural, namespace, name), None)
            self.changed.notify_all()

    def finish_deletion(self, key: Key) -> None:
        """Removes the object, as after its last finalizer, and the objects that it owns."""
        self.remove(*key)
        self.controllers.deleted(key)

    def edit(self, key: Key, manager: str, path: tuple[str, ...], value: Any) -> None:
        """Another manager sets one field, and owns it from then on."""
        with self.changed:
            live = copy.deepcopy(self.objects[key])
            inner = live
            for part in path[:-1]:
                inner = inner[part]
            inner[path[-1]] = value
            for owned in self.owners.setdefault(key, {}).values():
                owned.discard(path)
            self.owners[key].setdefault(manager, set()).add(path)
            self.put(live)

    def add_namespace(self, name: str, phase: str = "Active") -> None:
        self.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}, "status": {"phase": phase}})

    def key_of(self, manifest: Object) -> Key:
        metadata = manifest["metadata"]
        plural = self.kinds[manifest["apiVersion"]][manifest["kind"]]
        return manifest["apiVersion"], plural, metadata.get("namespace", ""), metadata["name"]

    def named(self, plural: str) -> list[str]:
        return sorted(key[3] for key in self.objects if key[1] == plural)

    def found(self, plural: str, labels: dict[str, str]) -> list[Object]:
        """Objects with these labels."""
        return [
            each for key, each in list(self.objects.items()) if key[1] == plural and labels.items() <= labels_of(each).items()
        ]

    def kubeconfig(self, name: str = "stand-in") -> str:
        """The text of a kubeconfig for this server. name: of its context."""
        cluster = {"name": "stand-in", "cluster": {"server": self.url}}
        user = {"name": "tester", "user": {"token": "any"}}
        context = {"name": name, "context": {"cluster": "stand-in", "user": "tester", "namespace": "default"}}
        return json.dumps(
            {"clusters": [cluster], "users": [user], "contexts": [context], "current-context": name, "kind": "Config"}
        )

    # -- HTTP ---------------------------------------------------------------------------------------------------------

    def _app(self) -> Flask:
        app = Flask(__name__)
        app.get("/version", endpoint="version")(lambda: {"major": "1", "minor": "36", "gitVersion": "v1.36.0"})
        app.get("/apis")(self._groups)
        app.get("/api/v1", endpoint="core")(lambda: self._resources("v1"))
        app.get("/apis/<group>/<version>", endpoint="group")(lambda group, version: self._resources(f"{group}/{version}"))
        of_no_namespace = {"plural": "namespaces", "namespace": ""}
        app.add_url_rule("/api/<version>/namespaces/<name>", "namespace", self._one, methods=["GET"], defaults=of_no_namespace)
        for i, prefix in enumerate(("/api/<version>", "/apis/<group>/<version>")):
            collection = f"{prefix}/namespaces/<namespace>/<plural>"
            app.add_url_rule(f"{prefix}/<plural>", f"everywhere{i}", self._collection, methods=["GET"])
            app.add_url_rule(collection, f"list{i}", self._collection, methods=["GET", "POST"])
            app.add_url_rule(f"{collection}/<name>", f"one{i}", self._one, methods=["GET", "PATCH", "PUT", "DELETE"])
        app.get("/api/v1/namespaces/<namespace>/pods/<name>/log")(self._log)
        app.register_error_handler(404, lambda _: self._not_known(f"{request.method} {request.path}"))
        app.register_error_handler(405, lambda _: self._not_known(f"{request.method} {request.path}"))
        return app

    def _groups(self) -> Object:
        groups = []
        for api_version in self.kinds:
            if "/" in api_version:
                version = {"groupVersion": api_version, "version": api_version.split("/")[1]}
                groups.append({"name": api_version.split("/")[0], "versions": [version], "preferredVersion": version})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}

    def _resources(self, api_version: str) -> Any:
        if api_version not in self.kinds:
            return Response("404 page not found\n", 404, mimetype="text/plain")
        verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
        resources = [
            {"name": plural, "singularName": kind.lower(), "namespaced": kind != "Namespace", "kind": kind, "verbs": verbs}
            for kind, plural in self.kinds[api_version].items()
        ]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": resources}

    def _collection(self, version: str, plural: str, namespace: str = "", group: str = "") -> Any:
        api_version = f"{group}/{version}" if group else version
        watched = bool(request.args.get("watch"))
        verb = "create" if request.method == "POST" else "watch" if watched else "list"
        refused = self._denied(verb, api_version, plural, namespace)
        if refused is not None:
            return refused
        if verb == "create":
            return self._create(api_version, plural, namespace)
        selector = request.args.get("labelSelector", "")
        if any(sign in selector for sign in ("!", " ", "(")):
            return self._not_known(f"labelSelector={selector}")
        wanted = dict(part.split("=", 1) for part in selector.split(",") if part)

        def matching() -> list[Object]:
            return [
                each
                for key, each in list(self.objects.items())
                if key[:2] == (api_version, plural) and namespace in ("", key[2]) and wanted.items() <= labels_of(each).items()
            ]

        if watched:
            seconds = float(request.args.get("timeoutSeconds", 1))
            return Response(self._watch(matching, seconds), mimetype="application/json")
        if plural == "pods" and "serving.knative.dev/service" not in wanted and self.lingering_gateways:
            self.lingering_gateways -= 1
            if not self.lingering_gateways:
                self.controllers.end_old_pods()
        if plural == "pods" and "serving.knative.dev/service" in wanted and self.stages_scale_to_zero:
            for pod in matching():
                self.remove(*self.key_of(pod))
        bare = [{key: value for key, value in each.items() if key not in ("apiVersion", "kind")} for each in matching()]
        kind = next(kind for kind, name in self.kinds[api_version].items() if name == plural)
        metadata = {"resourceVersion": str(next(self._version))}
        return {"kind": f"{kind}List", "apiVersion": api_version, "metadata": metadata, "items": bare}

    def _watch(self, matching: Callable[[], list[Object]], seconds: float) -> Iterator[str]:
        seen: dict[str, Object] = {}
        end = time.monotonic() + seconds
        with self.changed:
            while (left := end - time.monotonic()) > 0:
                now = {each["metadata"]["name"]: each for each in matching()}
                for name in seen.keys() - now.keys():
                    yield json.dumps({"type": "DELETED", "object": seen.pop(name)}) + "\n"
                for name, each in now.items():
                    if name not in seen or seen[name]["metadata"]["resourceVersion"] != each["metadata"]["resourceVersion"]:
                        yield json.dumps({"type": "MODIFIED" if name in seen else "ADDED", "object": each}) + "\n"
                        seen[name] = each
                if not self.changed.wait(min(left, 0.3)):
                    return  # a real watch lasts longer; a client must accept its end at any time

    def _one(self, version: str, namespace: str, plural: str, name: str, group: str = "") -> Any:
        key = (f"{group}/{version}" if group else version, plural, namespace, name)
        verb = {"GET": "get", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}[request.method]
        refused = self._denied(verb, key[0], plural, namespace or (name if plural == "namespaces" else ""), name)
        if refused is not None:
            return refused
        with self.changed:
            if verb == "patch":
                return self._apply(key)
            if key not in self.objects:
                return _not_found(plural, name)
            if verb == "delete":
                return self._delete(key)
            return self._replace(key) if verb == "update" else self.objects[key]

    def _log(self, namespace: str, name: str) -> Any:
        refused = self._denied("get", "v1", "pods/log", namespace, name)
        if refused is not None:
            return refused
        pod = self.objects.get(("v1", "pods", namespace, name))
        if pod is None:
            return _not_found("pods", name)
        container = request.args.get("container")
        if container not in [each["name"] for each in pod["spec"]["containers"]]:
            return _status(400, f"container {container} is not valid for pod {name}", name)
        if request.args.get("previous") == "true" or name not in self.logs:
            return _status(400, f'previous terminated container "{container}" in pod "{name}" not found', name)
        return Response(self.logs[name], mimetype="text/plain")

    def _denied(self, verb: str, api_version: str, plural: str, namespace: str, name: str = "") -> Any:
        """Records the request, and returns an error if it is not permitted or unknown."""
        group = api_version.split("/")[0] if "/" in api_version else ""
        if plural.split("/")[0] not in self.kinds.get(api_version, {}).values():
            return Response("404 page not found\n", 404, mimetype="text/plain")
        if extra := set(request.args) - _QUERY:
            return self._not_known(f"{request.method} {request.path} with {sorted(extra)}")
        self.calls.add((verb, group, plural, namespace))
        if (verb, plural) not in self.forbidden and (namespace or not self.forbidden_everywhere):
            return None
        resource = f"{plural}.{group}" if group else plural
        return _status(
            403,
            f'{resource} "{name}" is forbidden: User "tester" cannot {verb} resource "{plural}" in API group "{group}" in the '
            f'namespace "{namespace}"',
            name,
        )

    def _not_known(self, what: str) -> Any:
        self.unknown.append(what)
        return _status(501, f"the stand-in does not know {what}")

    # -- Writing ------------------------------------------------------------------------------------------------------

    def _apply(self, key: Key) -> Any:
        if request.content_type != "application/apply-patch+yaml":
            return self._not_known(f"a patch of type {request.content_type}")
        manifest, manager = json.loads(request.data), request.args["fieldManager"]
        live, owners = copy.deepcopy(self.objects.get(key)) or {}, self.owners.get(key, {})
        if not live:
            refused = self._denied("create", *key[:3], key[3])
            if refused is not None:
                return refused
        if manifest["metadata"].get("managedFields"):
            return _status(400, "metadata.managedFields must be nil", key[3])
        against = conflicts(live, manifest, manager, owners)
        if against and request.args.get("force") != "true":
            return _apply_conflict(key, against)
        after = merged(live, manifest, manager, owners)
        if key[:2] == SERVICE:
            after["spec"].setdefault("traffic", [{"latestRevision": True, "percent": 100}])  # Knative's defaulting webhook
        return self._refused(key, after) or self._written(key, live, after, taken_over(manifest, manager, owners))

    def _refused(self, key: Key, manifest: Object) -> Any:
        namespace = self.objects.get(("v1", "namespaces", "", key[2]))
        if namespace is None:
            return _not_found("namespaces", key[2])
        if key not in self.objects and namespace["status"]["phase"] == "Terminating":
            text = f"unable to create new content in namespace {key[2]} because it is being terminated"
            return _status(403, f'{key[1]} "{key[3]}" is forbidden: {text}', key[3])
        if key[:2] != SERVICE:
            return None
        if self.quota_message:
            return _status(403, f'services "{key[3]}" is forbidden: exceeded quota: {self.quota_message}', key[3])
        text = refusal(manifest, self.enabled)
        if text is not None:
            webhook = "validation.webhook.serving.knative.dev"
            return _status(400, f'admission webhook "{webhook}" denied the request: {text}', key[3])
        asked = {key: manifest["metadata"][key] for key in ("labels", "annotations") if key in manifest["metadata"]}
        fields = unknown_fields({"metadata": asked, "spec": manifest["spec"]}, self.enabled)
        return self._not_known(f"a verdict on {', '.join(fields)} of {key[3]}") if fields else None

    def _written(self, key: Key, live: Object, after: Object, owners: Owners) -> Any:
        metadata = after["metadata"]
        metadata["namespace"] = key[2]
        changed = after.get("spec") != live.get("spec")
        if key[0] not in _WITHOUT_GENERATION:
            metadata["generation"] = live.get("metadata", {}).get("generation", 0) + changed
        metadata["managedFields"] = managed_fields(owners, key[0])
        if request.args.get("dryRun") == "All":
            return after
        self.owners[key] = owners
        self.applied.append(key[3])
        if after != live:
            self.put(after)
        if changed:
            self.controllers.reconcile(key)
        return self.objects[key]

    def _create(self, api_version: str, plural: str, namespace: str) -> Any:
        manifest = json.loads(request.data)
        key = (api_version, plural, namespace, manifest["metadata"]["name"])
        with self.changed:
            if key in self.objects:
                return _status(409, f'{plural} "{key[3]}" already exists', key[3], "AlreadyExists")
            return self._refused(key, manifest) or (self._written(key, {}, manifest, {}), 201)

    def _replace(self, key: Key) -> Any:
        manifest = json.loads(request.data)
        seen, live = manifest["metadata"].get("resourceVersion"), self.objects[key]
        if seen and seen != live["metadata"]["resourceVersion"]:
            text = "the object has been modified; please apply your changes to the latest version and try again"
            return _status(409, f'Operation cannot be fulfilled on {key[1]} "{key[3]}": {text}', key[3])
        return self._written(key, copy.deepcopy(live), manifest, self.owners.get(key, {}))

    def _delete(self, key: Key) -> Any:
        live = self.objects[key]
        wanted = (json.loads(request.data or b"{}").get("preconditions") or {}).get("resourceVersion")
        if wanted and wanted != live["metadata"]["resourceVersion"]:
            text = f"the ResourceVersion in the precondition ({wanted}) does not match"
            return _status(409, f'Operation cannot be fulfilled on {key[1]} "{key[3]}": Precondition failed: {text}', key[3])
        if live["metadata"].get("finalizers"):
            return self.put({**live, "metadata": {**live["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}})
        self.finish_deletion(key)
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}


def labels_of(manifest: Object) -> dict[str, str]:
    return manifest["metadata"].get("labels") or {}


def _not_found(plural: str, name: str) -> Any:
    return _status(404, f'{plural} "{name}" not found', name)


def _apply_conflict(key: Key, against: dict[str, list[str]]) -> Any:
    count = sum(map(len, against.values()))
    text = "; ".join(f'conflict with "{other}" using {key[0]}: {", ".join(fields)}' for other, fields in against.items())
    plural = "" if count == 1 else "s"
    return _status(409, f"Apply failed with {count} conflict{plural}: {text}", key[3])


def _status(code: int, message: str, name: str = "", reason: str = "") -> Any:
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason or _REASONS[code],
        "details": {"name": name},
        "code": code,
    }
    return Response(json.dumps(body), code, mimetype="application/json")


__all__ = ["BROKER", "EVENTING", "SEQUENCE", "SERVICE", "TRIGGER", "Key", "KubernetesApi", "labels_of"]
