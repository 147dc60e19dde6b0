"""Objects for tests of the deployer: a pipeline of three stages, another one, and their Secrets and sinks."""

import time
from collections.abc import Callable
from typing import Any

from knative.spec.cut import format_cut
from knative.spec.kubernetes_object import KubernetesObject
from tests.support.knative.kubernetes_api import KubernetesApi
from tests.support.knative.pipelines import rendered_pipeline

CUT = ((0, 10), (10, 20), (20, 30))
GATEWAY = ("serving.knative.dev/v1", "services", "default", "chat")  # key of the gateway's Service in the stand-in


def objects(
    cut: tuple[tuple[int, int], ...] = CUT, digest: str = "d" * 64, spec: dict[str, Any] | None = None, **stage: object
) -> list[KubernetesObject]:
    """spec: more fields of the spec; stage: fields of its `stage`."""
    return rendered_pipeline(digest, cut=format_cut(cut), stage=stage, **(spec or {}))


def other(**spec: Any) -> list[KubernetesObject]:
    """The same pipeline with another model."""
    return objects(digest="e" * 64, spec=spec)


def stage_name(rendered: list[KubernetesObject], index: int) -> str:
    return next(each["metadata"]["name"] for each in rendered if each["metadata"]["name"].endswith(f"-s{index}"))


def services(rendered: list[KubernetesObject]) -> list[str]:
    return sorted(each["metadata"]["name"] for each in rendered if each["kind"] == "Service")


def secret(name: str, *keys: str) -> KubernetesObject:
    metadata = {"name": name, "namespace": "default"}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": dict.fromkeys(keys, "eA==")}


def account(name: str) -> KubernetesObject:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": "default", "labels": {}}}


def sink(name: str) -> KubernetesObject:
    """A Knative Service that is not Lamina's."""
    metadata = {"name": name, "namespace": "default", "labels": {}}
    return {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": metadata, "spec": {"template": {}}}


def traffic(api: KubernetesApi) -> list[dict[str, Any]]:
    """The split in the spec of the gateway's Service."""
    asked: list[dict[str, Any]] = api.objects[GATEWAY]["spec"]["traffic"]
    return asked


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "not within ten seconds"
        time.sleep(0.01)
