"""The flags of config-features, which say what fields a pod may have (knative/serving, pkg/apis/config/features.go)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

ENABLED: Final = "Enabled"
ALLOWED: Final = "Allowed"
DISABLED: Final = "Disabled"
ALLOW_ROOT_BOUNDED: Final = "AllowRootBounded"

POD_FIELDS: Final = {
    **{
        name: f"kubernetes.podspec-{name.lower()}"
        for name in (
            "affinity", "dnsConfig", "dnsPolicy", "hostAliases", "hostIPC", "hostNetwork", "hostPID", "nodeSelector",
            "priorityClassName", "runtimeClassName", "schedulerName", "securityContext", "shareProcessNamespace",
            "tolerations", "topologySpreadConstraints",
        )
    },
    "initContainers": "kubernetes.podspec-init-containers",
}  # fmt: skip
"""Field of `spec.template.spec` → its flag."""
VOLUME_FIELDS: Final = {
    "emptyDir": "kubernetes.podspec-volumes-emptydir",
    "persistentVolumeClaim": "kubernetes.podspec-persistent-volume-claim",
    **{name: f"kubernetes.podspec-volumes-{name.lower()}" for name in ("image", "hostPath", "csi", "ephemeral")},
}
"""Kind of a volume → its flag; Secrets, ConfigMaps and projections have none."""
FIELD_REF: Final = "kubernetes.podspec-fieldref"
MOUNT_PROPAGATION: Final = "kubernetes.podspec-volumes-mount-propagation"
ADD_CAPABILITIES: Final = "kubernetes.containerspec-addcapabilities"
MULTI_CONTAINER_PROBING: Final = "multi-container-probing"
SECURE_POD_DEFAULTS: Final = "secure-pod-defaults"

_ENABLED_BY_DEFAULT: Final = frozenset({"multi-container", "kubernetes.podspec-volumes-emptydir"})
_VALUES: Final = {value.lower(): value for value in (ENABLED, ALLOWED, DISABLED)}
_SECURE_POD_DEFAULTS_VALUES: Final = {value.lower(): value for value in (ENABLED, ALLOW_ROOT_BOUNDED, DISABLED)}


class NoFeatures(ValueError):
    """A document is not the ConfigMap config-features. The message says what it is instead."""


@dataclass(frozen=True, slots=True)
class FeatureFlags:
    """The flags of a cluster's config-features. Absent flags and unknown values count as Knative's defaults."""

    data: Mapping[str, str] = field(default_factory=dict)

    def value(self, flag: str) -> str:
        values = _SECURE_POD_DEFAULTS_VALUES if flag == SECURE_POD_DEFAULTS else _VALUES
        default = ENABLED if flag in _ENABLED_BY_DEFAULT else DISABLED
        return values.get(str(self.data.get(flag, default)).lower(), default)

    def let_through(self, flag: str) -> bool:
        return self.value(flag) != DISABLED

    def enabled(self, flag: str) -> bool:
        return self.value(flag) == ENABLED


def read_features(document: Any) -> FeatureFlags:
    """Reads the ConfigMap config-features, as `kubectl get` writes it. Raises NoFeatures."""
    if not isinstance(document, Mapping) or document.get("kind") != "ConfigMap":
        kind = document.get("kind") if isinstance(document, Mapping) else type(document).__name__
        raise NoFeatures(f"the ConfigMap config-features is wanted, not {kind!r}")
    name = (document.get("metadata") or {}).get("name")
    if name != "config-features":
        raise NoFeatures(f"the ConfigMap config-features is wanted, not {name!r}")
    data = document.get("data") or {}
    if not isinstance(data, Mapping):
        raise NoFeatures(f"data: flags by their names are wanted, not {type(data).__name__}")
    return FeatureFlags({str(key): str(value) for key, value in data.items() if key != "_example"})
