"""A small stand-in for the Kubernetes API with Knative behind it, over real HTTP.

It keeps objects, serves discovery, lists, watches, server-side apply with owners of fields, dry runs, deletion with
finalizers, pod logs; it refuses Knative Services as the webhook does; and it plays Knative's controller: a Service becomes
Ready, or fails in the way that the test asked for.
"""

import copy
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

from flask import Flask, Response, request
from werkzeug.serving import WSGIRequestHandler, make_server

Object = dict[str, Any]
Behaviour = Callable[["KubernetesApi", Object], None]

KINDS: dict[str, dict[str, str]] = {
    "v1": {
        "Secret": "secrets",
        "ConfigMap": "configmaps",
        "ServiceAccount": "serviceaccounts",
        "Pod": "pods",
        "Event": "events",
    },
    "apps/v1": {"Deployment": "deployments"},
    "rbac.authorization.k8s.io/v1": {"Role": "roles", "RoleBinding": "rolebindings"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies"},
    "serving.knative.dev/v1": {"Service": "services", "Revision": "revisions"},
}
SERVICE = ("serving.knative.dev/v1", "services")


class _Quiet(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None: ...


class KubernetesApi:
    """Serves on a loopback port from construction until `close`."""

    def __init__(self) -> None:
        self.kinds = copy.deepcopy(KINDS)
        self.objects: dict[tuple[str, str, str, str], Object] = {}
        """(apiVersion, plural, namespace, name) → object."""
        self.owners: dict[tuple[str, str, str, str], dict[str, set[str]]] = {}
        """Per object: field manager → paths of the leaves that it set last."""
        self.behaviours: dict[str, Behaviour] = {}
        """Service name → what the controller does with it; others become Ready."""
        self.forbidden: set[tuple[str, str]] = set()
        """(verb, plural) pairs that this identity may not use."""
        self.quota_message: str | None = None
        self.logs: dict[str, str] = {}
        self.applied: list[str] = []
        self.lingering_gateways = 0
        """How many lists of pods still show the old gateway's pods after it was replaced."""
        self._version = 0
        self._changed = threading.Condition()
        self._server = make_server("127.0.0.1", 0, self._app(), threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def put(self, manifest: Object) -> Object:
        """Writes an object past all checks, as a controller would."""
        api_version, kind = manifest["apiVersion"], manifest["kind"]
        metadata = manifest["metadata"]
        key = (api_version, self.kinds[api_version][kind], metadata.get("namespace", ""), metadata["name"])
        with self._changed:
            self._version += 1
            metadata["resourceVersion"] = str(self._version)
            self.objects[key] = manifest
            self._changed.notify_all()
        return manifest

    def remove(self, api_version: str, plural: str, namespace: str, name: str) -> None:
        with self._changed:
            self.objects.pop((api_version, plural, namespace, name), None)
            self._version += 1
            self._changed.notify_all()

    def named(self, plural: str) -> list[str]:
        return sorted(key[3] for key in self.objects if key[1] == plural)

    def kubeconfig(self) -> str:
        """The text of a kubeconfig for this server."""
        cluster = {"name": "stand-in", "cluster": {"server": self.url}}
        user = {"name": "tester", "user": {"token": "any"}}
        context = {"name": "stand-in", "context": {"cluster": "stand-in", "user": "tester", "namespace": "default"}}
        return json.dumps(
            {"clusters": [cluster], "users": [user], "contexts": [context], "current-context": "stand-in", "kind": "Config"}
        )

    # -- HTTP ---------------------------------------------------------------------------------------------------------

    def _app(self) -> Flask:
        app = Flask(__name__)
        app.get("/version", endpoint="version")(lambda: {"major": "1", "minor": "33", "gitVersion": "v1.33.0"})
        app.get("/apis")(self._groups)
        app.get("/api/v1", endpoint="core")(lambda: self._resources("v1"))
        app.get("/apis/<group>/<version>", endpoint="group")(lambda group, version: self._resources(f"{group}/{version}"))
        for i, prefix in enumerate(("/api/<version>", "/apis/<group>/<version>")):
            collection = f"{prefix}/namespaces/<namespace>/<plural>"
            app.get(collection, endpoint=f"list{i}")(self._list)
            app.add_url_rule(f"{collection}/<name>", f"one{i}", self._one, methods=["GET", "PATCH", "DELETE"])
        app.get("/api/v1/namespaces/<namespace>/pods/<name>/log")(self._log)
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
            return _status(404, "the server could not find the requested resource")
        verbs = ["get", "list", "watch", "patch", "delete"]
        resources = [
            {"name": plural, "singularName": "", "namespaced": True, "kind": kind, "verbs": verbs}
            for kind, plural in self.kinds[api_version].items()
        ]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": resources}

    def _list(self, version: str, namespace: str, plural: str, group: str = "") -> Any:
        api_version = f"{group}/{version}" if group else version
        if ("list", plural) in self.forbidden:
            return _status(403, f'{plural} is forbidden: User "tester" cannot list resource "{plural}"')
        selector = dict(part.split("=", 1) for part in request.args.get("labelSelector", "").split(",") if part)

        def matching() -> list[Object]:
            return [
                each
                for key, each in list(self.objects.items())
                if key[:3] == (api_version, plural, namespace)
                and selector.items() <= each["metadata"].get("labels", {}).items()
            ]

        if request.args.get("watch"):
            seconds = float(request.args.get("timeoutSeconds", 1))
            return Response(self._watch(matching, seconds), mimetype="application/json")
        if plural == "pods" and self.lingering_gateways:
            self.lingering_gateways -= 1
            if not self.lingering_gateways:
                self._end_old_gateways()
        bare = [{key: value for key, value in each.items() if key not in ("apiVersion", "kind")} for each in matching()]
        kind = next(kind for kind, name in self.kinds[api_version].items() if name == plural)
        return {
            "kind": f"{kind}List",
            "apiVersion": api_version,
            "metadata": {"resourceVersion": str(self._version)},
            "items": bare,
        }

    def _watch(self, matching: Callable[[], list[Object]], seconds: float) -> Iterator[str]:
        seen: dict[str, str] = {}
        with self._changed:
            while True:
                for each in matching():
                    name, version = each["metadata"]["name"], each["metadata"]["resourceVersion"]
                    if seen.get(name) != version:
                        yield json.dumps({"type": "MODIFIED" if name in seen else "ADDED", "object": each}) + "\n"
                        seen[name] = version
                if not self._changed.wait(min(seconds, 0.3)):
                    return

    def _one(self, version: str, namespace: str, plural: str, name: str, group: str = "") -> Any:
        key = (f"{group}/{version}" if group else version, plural, namespace, name)
        if (request.method.lower(), plural) in self.forbidden:
            return _status(403, f'{plural} "{name}" is forbidden: User "tester" cannot {request.method.lower()} "{plural}"')
        if request.method == "PATCH":
            return self._apply(key)
        if key not in self.objects:
            return _status(404, f'{plural} "{name}" not found')
        if request.method == "DELETE":
            return self._delete(key)
        return self.objects[key]

    def _log(self, namespace: str, name: str) -> Any:
        if request.args.get("previous") == "true" or name not in self.logs:
            return _status(400, "previous terminated container not found")
        return Response(self.logs[name], mimetype="text/plain")

    # -- Server-side apply --------------------------------------------------------------------------------------------

    def _apply(self, key: tuple[str, str, str, str]) -> Any:
        assert request.content_type == "application/apply-patch+yaml", request.content_type
        manifest, manager = json.loads(request.data), request.args["fieldManager"]
        paths = set(_leaves(manifest, ""))
        refusal = self._refusal(key, manifest) or self._conflict(key, paths, manager, manifest)
        if refusal is not None:
            return refusal
        live = copy.deepcopy(self.objects.get(key)) or {}
        dropped = self.owners.get(key, {}).get(manager, set()) - paths
        merged = _merge(_without(live, dropped), manifest)
        changed = merged.get("spec") != live.get("spec")
        merged["metadata"]["generation"] = live.get("metadata", {}).get("generation", 0) + changed
        if request.args.get("dryRun") == "All":
            return merged
        for other in self.owners.setdefault(key, {}).values():
            other.difference_update(paths)
        self.owners[key][manager] = paths
        self.applied.append(key[3])
        self.put(merged)
        if key[:2] == SERVICE and changed:
            self.behaviours.get(key[3], become_ready)(self, merged)
        return self.objects[key]

    def _refusal(self, key: tuple[str, str, str, str], manifest: Object) -> Any:
        if self.quota_message and key[:2] == SERVICE:
            return _status(403, f'services "{key[3]}" is forbidden: exceeded quota: {self.quota_message}')
        if key[:2] != SERVICE:
            return None
        from knative.webhook.check import validate

        violations = validate(manifest)
        if not violations:
            return None
        text = "; ".join(f"{violation.reason}: {violation.field}" for violation in violations)
        webhook = "validation.webhook.serving.knative.dev"
        return _status(400, f'admission webhook "{webhook}" denied the request: validation failed: {text}')

    def _conflict(self, key: tuple[str, str, str, str], paths: set[str], manager: str, manifest: Object) -> Any:
        if request.args.get("force") == "true":
            return None
        for other, owned in self.owners.get(key, {}).items():
            taken = {path for path in paths & owned if other != manager and _at(self.objects[key], path) != _at(manifest, path)}
            if taken:
                return _status(
                    409, f'Apply failed with {len(taken)} conflict: conflict with "{other}": {", ".join(sorted(taken))}'
                )
        return None

    def _delete(self, key: tuple[str, str, str, str]) -> Any:
        live = self.objects[key]
        if live["metadata"].get("finalizers"):
            live["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            self.put(live)
            return live
        self.remove(*key)
        for pod in list(self.objects):
            if pod[1] == "pods" and self.objects[pod]["metadata"]["labels"].get("serving.knative.dev/service") == key[3]:
                self.remove(*pod)
        return {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    # -- Knative's controller -----------------------------------------------------------------------------------------

    def revise(self, service: Object, status: str, reason: str = "", message: str = "") -> str:
        """Writes the Service's status as Knative does; returns the name of the newest revision."""
        metadata = service["metadata"]
        revision = f"{metadata['name']}-{metadata['generation']:05d}"
        condition = {"type": "Ready", "status": status, "reason": reason, "message": message}
        service["status"] = {
            "observedGeneration": metadata["generation"],
            "latestCreatedRevisionName": revision,
            "conditions": [{key: value for key, value in condition.items() if value}],
            "url": f"http://{metadata['name']}.{metadata['namespace']}.example",
        }
        self.put(service)
        return revision

    def add_pod(self, service: Object, revision: str, container_status: Object) -> None:
        labels = {
            **service["spec"]["template"]["metadata"].get("labels", {}),
            "serving.knative.dev/revision": revision,
            "serving.knative.dev/service": service["metadata"]["name"],
        }
        metadata = {"name": f"{revision}-pod", "namespace": service["metadata"]["namespace"], "labels": labels}
        status = {"containerStatuses": [{"name": "function", "restartCount": 0, **container_status}]}
        self.put({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": status})

    def _end_old_gateways(self) -> None:
        """All but the newest revision's pods of every gateway."""
        for key, pod in list(self.objects.items()):
            labels = pod["metadata"].get("labels", {})
            if key[1] == "pods" and labels.get("app.kubernetes.io/component") == "gateway":
                service = self.objects[(*SERVICE, key[2], labels["serving.knative.dev/service"])]
                if service["status"]["latestCreatedRevisionName"] != labels["serving.knative.dev/revision"]:
                    self.remove(*key)


def become_ready(api: KubernetesApi, service: Object) -> None:
    revision = api.revise(service, "True")
    api.add_pod(service, revision, {"state": {"running": {}}})
    if not api.lingering_gateways:
        api._end_old_gateways()


def never_ready(api: KubernetesApi, service: Object) -> None:
    api.revise(service, "Unknown", "RevisionMissing", "Configuration is waiting for a Revision to become ready.")


def image_pull_fails(api: KubernetesApi, service: Object) -> None:
    revision = api.revise(service, "Unknown", "RevisionMissing", "Configuration is waiting for a Revision to become ready.")
    waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "registry.example/lamina:missing"'}
    api.add_pod(service, revision, {"state": {"waiting": waiting}})


def crash_loops(api: KubernetesApi, service: Object) -> None:
    revision = api.revise(service, "Unknown", "RevisionMissing", "Configuration is waiting for a Revision to become ready.")
    ended = {"exitCode": 1, "reason": "Error"}
    waiting = {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}
    status = {"state": {"waiting": waiting}, "lastState": {"terminated": ended}, "restartCount": 3}
    api.add_pod(service, revision, status)
    api.logs[f"{revision}-pod"] = "ERROR bucket 'lamina' does not exist\n"


def revision_fails(api: KubernetesApi, service: Object) -> None:
    revision = api.revise(service, "False", "RevisionFailed", "Revision failed: initial scale was never achieved")
    involved = {"kind": "ReplicaSet", "name": f"{revision}-deployment-abc"}
    namespace = service["metadata"]["namespace"]
    api.put(
        {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{revision}.1", "namespace": namespace},
            "involvedObject": involved,
            "type": "Warning",
            "reason": "FailedCreate",
            "message": "pods is forbidden: exceeded quota: requests.memory",
        }
    )


def _status(code: int, message: str) -> Any:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}
    return Response(json.dumps(body), code, mimetype="application/json")


def _leaves(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not (path == "" and key in ("apiVersion", "kind")) and f"{path}/{key}" not in (
                "/metadata/name",
                "/metadata/namespace",
            ):
                yield from _leaves(inner, f"{path}/{key}")
    else:
        yield path


def _split(path: str) -> list[str]:
    """Keys with slashes in them, such as labels, are put together again by trying: see `_at`."""
    return path.strip("/").split("/")


def _at(value: Any, path: str) -> Any:
    parts = _split(path)
    while parts:
        for length in range(len(parts), 0, -1):
            key = "/".join(parts[:length])
            if isinstance(value, dict) and key in value:
                value, parts = value[key], parts[length:]
                break
        else:
            return None
    return value


def _without(value: Object, paths: set[str], prefix: str = "") -> Object:
    kept = {}
    for key, inner in value.items():
        path = f"{prefix}/{key}"
        if path not in paths:
            kept[key] = _without(inner, paths, path) if isinstance(inner, dict) else inner
    return kept


def _merge(live: Object, applied: Object) -> Object:
    merged = dict(live)
    for key, value in applied.items():
        merged[key] = _merge(live.get(key) or {}, value) if isinstance(value, dict) else value
    return merged
