"""What Knative would do with a Service and this machine does not: refused where answers would differ, else named.

docs/local-knative.md lists the differences; what is missing here is emulated or has no meaning on one machine.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from knative.local.errors import UnsupportedManifest
from knative.webhook.annotations import NETWORKING, ROLLOUT_DURATION

Manifest = Mapping[str, Any]


def refuse_unsupported(manifest: Manifest) -> None:
    """Raises UnsupportedManifest, which names every field."""
    name, found = manifest["metadata"]["name"], list(_unsupported(manifest["spec"]))
    if found:
        raise UnsupportedManifest(f"{name}: {'; '.join(found)}")


def ignored(manifest: Manifest) -> Iterator[str]:
    """Fields that change nothing here, each with what a cluster does."""
    annotations = manifest["metadata"].get("annotations") or {}
    for key in ROLLOUT_DURATION.keys:
        if key in annotations:
            yield f"metadata.annotations.{key}: traffic moves at once here, not over {annotations[key]}"
    of_template = manifest["spec"]["template"].get("metadata", {}).get("annotations") or {}
    for at, given in (("metadata", annotations), ("spec.template.metadata", of_template)):
        for key in sorted(set(given) & set(NETWORKING)):
            yield f"{at}.annotations.{key}: there is one ingress here, and it speaks HTTP"


def _unsupported(spec: Manifest) -> Iterator[str]:
    for index, target in enumerate(spec.get("traffic") or ()):
        if target.get("tag"):
            yield f"spec.traffic[{index}].tag: a tag has no URL of its own on one machine"
    pod = spec["template"]["spec"]
    for index, volume in enumerate(pod.get("volumes") or ()):
        for kind in sorted(set(volume) - {"name", "emptyDir", "secret"}):
            yield f"spec.template.spec.volumes[{index}].{kind}: is not mounted on one machine: files would be missing"
        for item in (volume.get("secret") or {}).get("items") or ():
            if item["path"] != item["key"]:
                yield f"spec.template.spec.volumes[{index}].secret.items: on one machine a file is called as its key is"
    for index, container in enumerate(pod["containers"]):
        yield from _of_container(container, f"spec.template.spec.containers[{index}]")


def _of_container(container: Manifest, at: str) -> Iterator[str]:
    if container.get("startupProbe"):
        yield f"{at}.startupProbe: only readiness and liveness are probed on one machine"
    if container.get("workingDir"):
        yield f"{at}.workingDir: every container runs in the project's folder"
    for index, port in enumerate(container.get("ports") or ()):
        if port.get("name") == "h2c":
            yield f"{at}.ports[{index}].name: h2c is not spoken on one machine, only HTTP/1.1"
