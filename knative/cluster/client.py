"""The client of a Kubernetes API, with only the requests that a deployment needs.

Its methods raise a ClusterError for every failure. No other file imports the kubernetes client.
"""

import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import ConflictError, NotFoundError, ResourceNotFoundError
from urllib3.exceptions import HTTPError

from knative.cluster.errors import ClusterUnreachable, KindMissing, Rejected, cluster_error
from knative.spec.kubernetes_object import KubernetesObject

FIELD_MANAGER: Final = "lamina"
_TIMEOUT_SECONDS: Final = 30
_INSTALL_HINTS: Final = {
    "serving.knative.dev": "install Knative Serving, or choose another context",
    "eventing.knative.dev": "install Knative Eventing",
    "flows.knative.dev": "install Knative Eventing",
    "messaging.knative.dev": "install Knative Eventing",
    "sources.knative.dev": "install Knative Eventing",
    "monitoring.coreos.com": "install the Prometheus operator, or leave monitoring out",
}


@dataclass(frozen=True, slots=True)
class Ref:
    """Identity of one Kubernetes object. namespace: empty for an object that belongs to none."""

    api_version: str
    kind: str
    namespace: str
    name: str

    @classmethod
    def of(cls, manifest: KubernetesObject) -> "Ref":
        metadata = manifest["metadata"]
        return cls(manifest["apiVersion"], manifest["kind"], metadata.get("namespace", ""), metadata["name"])

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


class Cluster:
    """One API server, used with the rights of one user or ServiceAccount."""

    def __init__(self, api: client.ApiClient, description: str, default_namespace: str = "default") -> None:
        """Asks the server which kinds it serves. Raises ClusterUnreachable or NotPermitted.

        description: names the server in messages. default_namespace: the one that commands use if the user names none.
        """
        self.description = description
        self.default_namespace = default_namespace
        self._api = api
        self._discovering = threading.Lock()  # discovery is not thread-safe, and a lease is renewed in a thread of its own
        # The client's default cache outlives the process, and lacks CRDs that were installed since.
        folder = tempfile.mkdtemp(prefix="lamina-discovery-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        try:
            with self._errors("asking which kinds the API serves"):
                self._dynamic = DynamicClient(api, cache_file=f"{folder}/cache.json")
        except (Rejected, AttributeError, TypeError, ValueError) as error:  # the client accepts any JSON or text as a reply
            raise ClusterUnreachable(f"{description} answers, but not as a Kubernetes API does: {error}") from error

    @classmethod
    def connect(cls, kubeconfig: str | None = None, context: str | None = None) -> "Cluster":
        """Connects by a kubeconfig, or else with the ServiceAccount of the pod that this process runs in.

        kubeconfig: a file; None: $KUBECONFIG, which may name several files separated by colons, or ~/.kube/config. context: a
        name in it; None: its current one. The pod's ServiceAccount is used only if both are None and there is no kubeconfig.
        Raises ClusterUnreachable, or NotPermitted if the server refuses the identity.
        """
        try:
            contexts, active = config.list_kube_config_contexts(kubeconfig)
            api = config.new_client_from_config(kubeconfig, context, persist_config=False)
        except ConfigException as error:
            return cls._in_cluster(error, named=bool(kubeconfig or context))
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError) as error:
            where = kubeconfig or os.environ.get("KUBECONFIG", "~/.kube/config")
            raise ClusterUnreachable(f"{where} is not a kubeconfig: {' '.join(str(error).split())}") from error
        chosen = next(entry for entry in contexts if entry["name"] == (context or active["name"]))
        namespace = chosen["context"].get("namespace", "default")
        return cls(api, f"context {chosen['name']} at {api.configuration.host}", namespace)

    @classmethod
    def _in_cluster(cls, cause: ConfigException, named: bool) -> "Cluster":
        settings = client.Configuration()
        try:
            if named:
                raise cause
            config.load_incluster_config(settings)
        except ConfigException as error:
            raise ClusterUnreachable(
                f"no cluster to talk to: {cause}; name a kubeconfig with --kubeconfig or KUBECONFIG, a context with --context"
            ) from error
        return cls(client.ApiClient(settings), f"this pod's cluster at {settings.host}")

    def serves(self, api_version: str, kind: str) -> bool:
        try:
            self.require(api_version, kind)
        except KindMissing:
            return False
        return True

    def require(self, api_version: str, kind: str) -> Any:
        """Returns the kubernetes client's resource for a kind. Raises KindMissing; the message says what to install."""
        with self._discovering, self._errors(f"looking for {kind}"):
            try:
                return self._dynamic.resources.get(api_version=api_version, kind=kind)
            except ResourceNotFoundError as error:
                hint = _INSTALL_HINTS.get(api_version.split("/")[0], "install what brings it")
                raise KindMissing(f"{self.description} does not serve {kind} ({api_version}); {hint}") from error

    def serves_group(self, group: str) -> bool:
        """Whether the server has an API group, such as metrics.k8s.io."""
        with self._discovering, self._errors("listing API groups"):
            return group in self._dynamic.resources.api_groups

    def get(self, ref: Ref) -> KubernetesObject | None:
        resource = self.require(ref.api_version, ref.kind)
        with self._errors(f"reading {ref}"):
            try:
                return _plain(resource.get(name=ref.name, namespace=ref.namespace, _request_timeout=_TIMEOUT_SECONDS))
            except NotFoundError:
                return None

    def find(self, api_version: str, kind: str, namespace: str | None, selector: str = "") -> list[KubernetesObject]:
        """Objects whose labels match the selector, such as `a=b,c=d`. If `namespace` is None, lists all namespaces."""
        resource = self.require(api_version, kind)
        with self._errors(f"listing {kind} in {namespace or 'all namespaces'}"):
            found = resource.get(namespace=namespace, label_selector=selector, _request_timeout=_TIMEOUT_SECONDS)
        # Items of a list have neither kind nor apiVersion.
        return [{**item, "apiVersion": api_version, "kind": kind} for item in _plain(found)["items"] or []]

    def apply(self, manifest: KubernetesObject, *, force: bool = False, dry_run: bool = False) -> KubernetesObject:
        """Applies the manifest by server-side apply, as field manager `lamina`. Returns the object as the server then has it.

        force: take over fields that another field manager has set; without it they raise FieldConflict. dry_run: change
        nothing, and return the object as applying would make it.
        """
        ref = Ref.of(manifest)
        resource = self.require(ref.api_version, ref.kind)
        with self._errors(f"applying {ref}"):
            return _plain(
                resource.server_side_apply(
                    body=manifest,
                    name=ref.name,
                    namespace=ref.namespace,
                    field_manager=FIELD_MANAGER,
                    force_conflicts=force,
                    dry_run="All" if dry_run else None,
                    _request_timeout=_TIMEOUT_SECONDS,
                )
            )

    def create(self, manifest: KubernetesObject) -> KubernetesObject | None:
        """Creates the object and returns it. None if an object of that name exists already; it is not changed."""
        return self._write("creating", "create", manifest, ConflictError)

    def replace(self, manifest: KubernetesObject) -> KubernetesObject | None:
        """Replaces the object, returns the new one. None if it does not exist or its resourceVersion is not the manifest's."""
        return self._write("replacing", "replace", manifest, ConflictError, NotFoundError)

    def _write(self, doing: str, verb: str, manifest: KubernetesObject, *expected: type[Exception]) -> KubernetesObject | None:
        ref = Ref.of(manifest)
        write = getattr(self.require(ref.api_version, ref.kind), verb)
        with self._errors(f"{doing} {ref}"):
            try:
                return _plain(write(body=manifest, namespace=ref.namespace, _request_timeout=_TIMEOUT_SECONDS))
            except expected:
                return None

    def delete(self, ref: Ref, resource_version: str | None = None) -> bool:
        """Deletes the object. False if it does not exist, or if resource_version is given and is not the object's.

        Objects that it owns are deleted in the background.
        """
        resource = self.require(ref.api_version, ref.kind)
        body: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if resource_version is not None:
            body["preconditions"] = {"resourceVersion": resource_version}
        with self._errors(f"deleting {ref}"):
            try:
                resource.delete(name=ref.name, namespace=ref.namespace, body=body, _request_timeout=_TIMEOUT_SECONDS)
            except (ConflictError, NotFoundError):
                return False
        return True

    def watch(
        self, api_version: str, kind: str, namespace: str, selector: str, timeout_seconds: int
    ) -> Iterator[KubernetesObject]:
        """Yields each object as it is now and again after each change, until timeout_seconds. Deletions are not reported."""
        resource = self.require(api_version, kind)
        with self._errors(f"watching {kind} in {namespace}"):
            for event in self._dynamic.watch(resource, namespace=namespace, label_selector=selector, timeout=timeout_seconds):
                if event["type"] != "DELETED":
                    yield event["raw_object"]

    def log_tail(self, namespace: str, pod: str, container: str, lines: int, previous: bool = False) -> list[str]:
        """The last lines of a container's log; empty if there is no log.

        previous: read the log of the container that ran before the last restart.
        """
        core = client.CoreV1Api(self._api)
        with self._errors(f"reading the log of {pod}"):
            try:
                text = core.read_namespaced_pod_log(pod, namespace, container=container, tail_lines=lines, previous=previous)
            except ApiException as error:
                if error.status in (400, 404):
                    return []
                raise
        return (text or "").splitlines()

    def follow_log(self, namespace: str, pod: str, container: str, lines: int) -> Iterator[str]:
        """Yields the last `lines` lines of a container's log, then each new line as it is written, until the log ends."""
        core = client.CoreV1Api(self._api)
        with self._errors(f"following the log of {pod}"):
            response = core.read_namespaced_pod_log(
                pod, namespace, container=container, tail_lines=lines, follow=True, _preload_content=False
            )
            yield from (line.decode(errors="replace").rstrip("\n") for line in response)

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turns errors of the kubernetes client into ClusterErrors. doing: the request in words, for the message."""
        try:
            yield
        except ApiException as error:
            raise cluster_error(doing, error.status, error.body, str(error.reason)) from error
        except (HTTPError, OSError) as error:
            raise ClusterUnreachable(
                f"{doing}: {self.description} does not answer ({error}); check the cluster, the context and the network"
            ) from error


def _plain(answer: Any) -> KubernetesObject:
    plain: KubernetesObject = answer.to_dict()
    return plain
