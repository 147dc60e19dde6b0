"""Finds fields of a Service that have no effect on one machine: refused if answers would differ, else logged as warnings.

knative/local/README.md lists the differences to a cluster. Other fields are emulated or have no meaning on one machine.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from knative.local.errors import UnsupportedManifest
from knative.webhook.annotations import NETWORKING, ROLLOUT_DURATION

Manifest = Mapping[str, Any]


def refuse_unsupported(manifest: Manifest) -> None:
    """Raises UnsupportedManifest, which names every field of the Service that cannot be run here."""
    name, found = manifest["metadata"]["name"], list(_unsupported(manifest["spec"]))
    if found:
        raise UnsupportedManifest(f"{name}: {'; '.join(found)}")


def ignored(manifest: Manifest) -> Iterator[str]:
    """Yields a line for each field of the Service that is accepted but changes nothing here: its path and the difference."""
    annotations = manifest["metadata"].get("annotations") or {}
    for key in ROLLOUT_DURATION.keys:
        if key in annotations:
            yield f"metadata.annotations.{key}: traffic moves at once here, not over {annotations[key]}"
    template_annotations = manifest["spec"]["template"].get("metadata", {}).get("annotations") or {}
    for at, given in (("metadata", annotations), ("spec.template.metadata", template_annotations)):
        for key in sorted(set(given) & set(NETWORKING)):
            yield f"{at}.annotations.{key}: there is one ingress here, and it speaks HTTP"


def _unsupported(spec: Manifest) -> Iterator[str]:
    for index, target in enumerate(spec.get("traffic") or ()):
        if target.get("tag"):
            yield f"spec.traffic[{index}].tag: a tag has no URL of its own on one machine"
    pod = spec["template"]["spec"]
    for index, volume in enumerate(pod.get("volumes") or ()):
        at = f"spec.template.spec.volumes[{index}]"
        for kind in sorted(set(volume) - {"name", "emptyDir", "secret"}):
            yield f"{at}.{kind}: is not mounted on one machine: files would be missing"
        for item in (volume.get("secret") or {}).get("items") or ():
            if item["path"] != item["key"]:
                yield f"{at}.secret.items: on one machine a file has the name of its key"
    for index, container in enumerate(pod["containers"]):
        at = f"spec.template.spec.containers[{index}]"
        if container.get("startupProbe"):
            yield f"{at}.startupProbe: only readiness and liveness are probed on one machine"
        if container.get("workingDir"):
            yield f"{at}.workingDir: every container runs in the platform's folder"
        for position, port in enumerate(container.get("ports") or ()):
            if port.get("name") == "h2c":
                yield f"{at}.ports[{position}].name: h2c is not spoken on one machine, only HTTP/1.1"
