"""What a company's cluster wants of a pod besides what runs in it: where it may run, who pulls its image, what marks it."""

import re
from typing import Any, Final

from msgspec import Struct

from knative.spec.errors import SpecError

_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OWN_PREFIX: Final = "LAMINA_"
_OWN_LABELS: Final = ("app.kubernetes.io/", "lamina.dev/", "serving.knative.dev/")
_OWN_ANNOTATIONS: Final = ("autoscaling.knative.dev/",)


class Pod(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Kubernetes' own fields, as they are. Knative lets the first six through only where config-features has their flags on
    (knative/webhook/feature_flags.py); `deploy` looks, and names the one that is missing."""

    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    affinity: dict[str, Any] | None = None
    topology_spread_constraints: list[dict[str, Any]] = []
    """Select by `app.kubernetes.io/instance` and `app.kubernetes.io/component`, which all pods of a pipeline have."""
    priority_class: str | None = None
    runtime_class: str | None = None
    image_pull_secrets: list[str] = []
    labels: dict[str, str] = {}
    """Of the pods, beside Lamina's own."""
    annotations: dict[str, str] = {}
    env: dict[str, str] = {}
    """Of the function's container, such as HTTPS_PROXY or AWS_ENDPOINT_URL_STS. What is a field of the spec is set there."""

    def rendered(self) -> dict[str, Any]:
        """The fields of a pod's spec."""
        fields: dict[str, Any] = {
            "nodeSelector": self.node_selector,
            "tolerations": self.tolerations,
            "affinity": self.affinity,
            "topologySpreadConstraints": self.topology_spread_constraints,
            "priorityClassName": self.priority_class,
            "runtimeClassName": self.runtime_class,
            "imagePullSecrets": [{"name": name} for name in self.image_pull_secrets],
        }
        return {name: value for name, value in fields.items() if value}


def check_pod(path: str, pod: Pod) -> None:
    """Raises SpecError for what would not be what it seems."""
    for name in pod.env:
        if not _ENV_NAME.fullmatch(name):
            raise SpecError(f"{path}.env: {name!r} is no name of a variable")
        if name.startswith(_OWN_PREFIX):
            raise SpecError(f"{path}.env: {name} is set by a field of the spec, and by nothing else (docs/reference.md)")
    for kind, names, owned in (("labels", pod.labels, _OWN_LABELS), ("annotations", pod.annotations, _OWN_ANNOTATIONS)):
        for name in names:
            if name.startswith(owned):
                raise SpecError(f"{path}.{kind}: {name} is Lamina's or Knative's own; its fields of the spec set it")
