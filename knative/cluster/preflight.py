"""What must be true of a cluster before anything is applied to it: namespace, kinds, versions, extensions, Secrets, sinks.

Only looks. All that is missing is reported at once.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from knative.cluster.client import Cluster, Ref
from knative.cluster.errors import ClusterError, KindMissing, NotPermitted, PreflightFailed
from knative.cluster.pipeline_token import wanted_secrets
from knative.spec.kubernetes_object import KubernetesObject
from knative.webhook.check import is_knative_service, missing_flags
from knative.webhook.feature_flags import FeatureFlags, read_features

OLDEST_KNATIVE: Final = (1, 10)
"""The oldest whose webhook takes every field that we render."""

_SYSTEM_NAMESPACE: Final = "knative-serving"
_CLASS: Final = "autoscaling.knative.dev/class"
_EVENTING: Final = ("eventing.knative.dev", "flows.knative.dev")


def check(cluster: Cluster, objects: list[KubernetesObject], say: Callable[[str], None]) -> None:
    """Raises KindMissing or PreflightFailed, with a line for each thing that is missing; says what could not be looked at."""
    namespace = objects[0]["metadata"]["namespace"]
    gone = _found_out(say, lambda: _namespace(cluster, namespace))
    if gone:
        raise PreflightFailed(gone[0])
    missing = list(_missing_kinds(cluster, objects))
    problems = [
        *map(str, missing),
        *_found_out(say, lambda: _old_version(cluster)),
        *_found_out(say, lambda: _no_hpa(cluster, objects)),
        *_found_out(say, lambda: _missing_features(cluster, objects)),
        *_found_out(say, lambda: _missing_secrets(cluster, objects)),
        *_found_out(say, lambda: _missing_for_pods(cluster, objects)),
        *_found_out(say, lambda: [] if missing else _missing_sinks(cluster, objects)),
    ]
    if problems:
        if len(problems) == len(missing):
            raise KindMissing("\n".join(problems))
        raise PreflightFailed("\n".join(problems))


def _found_out(say: Callable[[str], None], look: Callable[[], Any]) -> list[str]:
    try:
        return list(look())
    except NotPermitted as error:
        say(f"not checked, since we may not look: {error}")
        return []


def _namespace(cluster: Cluster, name: str) -> Iterator[str]:
    namespace = cluster.get(Ref("v1", "Namespace", "", name))
    if namespace is None:
        yield f"namespace {name} does not exist; make it with: kubectl create namespace {name}"
    elif namespace["metadata"].get("deletionTimestamp") or (namespace.get("status") or {}).get("phase") == "Terminating":
        yield f"namespace {name} is being deleted and takes nothing new; wait, then: kubectl create namespace {name}"


def _missing_kinds(cluster: Cluster, objects: list[KubernetesObject]) -> Iterator[ClusterError]:
    for api_version, kind in dict.fromkeys((each["apiVersion"], each["kind"]) for each in objects):
        try:
            cluster.require(api_version, kind)
        except KindMissing as error:
            yield error


def _old_version(cluster: Cluster) -> Iterator[str]:
    controller = cluster.get(Ref("apps/v1", "Deployment", _SYSTEM_NAMESPACE, "controller"))
    version = (controller or {"metadata": {}})["metadata"].get("labels", {}).get("app.kubernetes.io/version", "")
    match = re.match(r"v?(\d+)\.(\d+)", version)
    if match and (int(match[1]), int(match[2])) < OLDEST_KNATIVE:
        oldest = ".".join(map(str, OLDEST_KNATIVE))
        yield f"Knative Serving {version} is too old; upgrade it to {oldest} or newer"


def _missing_features(cluster: Cluster, objects: list[KubernetesObject]) -> Iterator[str]:
    """Fields of pods that the webhook lets through only where a flag of config-features says so."""
    wanted: dict[str, list[str]] = {}
    features: FeatureFlags | None = None
    for service in filter(is_knative_service, objects):
        if missing_flags(service):  # by Knative's defaults: the cluster is asked only where it matters
            features = features or _features(cluster)
            for flag, field in missing_flags(service, features).items():
                wanted.setdefault(flag, []).append(f"{service['metadata']['name']} sets {field.rpartition('.')[2]}")
    for flag, who in wanted.items():
        patch = f"""'{{"data":{{"{flag}":"enabled"}}}}'"""
        yield (
            f"{', '.join(who)}, which needs Knative's feature {flag}; enable it with: "
            f"kubectl -n {_SYSTEM_NAMESPACE} patch configmap config-features --type merge -p {patch}"
        )


def _features(cluster: Cluster) -> FeatureFlags:
    found = cluster.get(Ref("v1", "ConfigMap", _SYSTEM_NAMESPACE, "config-features"))
    return FeatureFlags() if found is None else read_features(found)


def _no_hpa(cluster: Cluster, objects: list[KubernetesObject]) -> Iterator[str]:
    if not any("hpa" in annotations.get(_CLASS, "") for annotations in _template_annotations(objects)):
        return
    if cluster.get(Ref("apps/v1", "Deployment", _SYSTEM_NAMESPACE, "autoscaler-hpa")) is None:
        yield "the class hpa needs Knative's HPA extension (Deployment autoscaler-hpa): install it, or use kpa"
    if not cluster.serves_group("metrics.k8s.io"):
        yield "the class hpa needs a metrics server (API metrics.k8s.io): install one, or use the class kpa"


def _template_annotations(objects: list[KubernetesObject]) -> Iterator[dict[str, str]]:
    for each in objects:
        if each["kind"] == "Service":
            yield each["spec"]["template"]["metadata"].get("annotations", {})


def _missing_secrets(cluster: Cluster, objects: list[KubernetesObject]) -> Iterator[str]:
    for ref, wanted in wanted_secrets(objects).items():
        found = cluster.get(ref)
        if found is None and wanted.is_token:
            continue  # the deployer makes it
        if found is None or not wanted.keys <= set(found.get("data") or {}):
            yield f"{ref} is missing or lacks {', '.join(sorted(wanted.keys))}; make it with: {_command(ref, wanted.keys)}"


def _missing_for_pods(cluster: Cluster, objects: list[KubernetesObject]) -> Iterator[str]:
    """As whom pods run, and what their image is pulled with: without the first no pod is made, and nobody says why."""
    own = set(map(Ref.of, objects))
    wanted: dict[Ref, list[str]] = {}
    for service in filter(is_knative_service, objects):
        pod, metadata = service["spec"]["template"]["spec"], service["metadata"]
        names = [("ServiceAccount", pod.get("serviceAccountName"))]
        names += [("Secret", each["name"]) for each in pod.get("imagePullSecrets", [])]
        for kind, name in names:
            if name and (ref := Ref("v1", kind, metadata["namespace"], name)) not in own:
                wanted.setdefault(ref, []).append(metadata["name"])
    for ref, who in wanted.items():
        if cluster.get(ref) is None:
            yield f"{ref} is missing, which pods of {', '.join(who)} need"


def _missing_sinks(cluster: Cluster, objects: list[KubernetesObject]) -> Iterator[str]:
    own = set(map(Ref.of, objects))
    for each in objects:
        if each["apiVersion"].split("/")[0] not in _EVENTING:
            continue
        for ref in dict.fromkeys(_references(each["spec"], each["metadata"]["namespace"])):
            if ref not in own and cluster.serves(ref.api_version, ref.kind) and cluster.get(ref) is None:
                by = f"{each['kind']} {each['metadata']['name']}"
                yield f"{ref}, to which {by} leads, is not there; make it, or name another sink"


def _references(value: Any, namespace: str) -> Iterator[Ref]:
    """Every `ref: {apiVersion, kind, name}` below."""
    if isinstance(value, dict):
        reference = value.get("ref")
        if isinstance(reference, dict):
            yield Ref(reference["apiVersion"], reference["kind"], reference.get("namespace", namespace), reference["name"])
        for inner in value.values():
            yield from _references(inner, namespace)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner, namespace)


def _command(ref: Ref, keys: frozenset[str]) -> str:
    literals = " ".join(f"--from-literal={key}=…" for key in sorted(keys))
    return f"kubectl -n {ref.namespace} create secret generic {ref.name} {literals}"
