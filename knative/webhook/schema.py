"""The schema of a Knative Service: its fields and their types (config/core/300-resources/service.yaml).

The API server refuses fields that are not in the schema. Knative's webhook refuses values of another type and reads nulls as
Go does. A schema here is a type's name, a dict of fields (a name that ends in "!" is required), a list with the schema of its
items, or `Mapping`.
"""

from collections.abc import Mapping as Fields
from dataclasses import dataclass
from typing import Any, Final

from knative.webhook.values import QUANTITY
from knative.webhook.violation import Violation, Violations


@dataclass(frozen=True, slots=True)
class Mapping:
    """The schema of an object with any keys, such as labels; all values have the schema `values`."""

    values: "Schema"


Schema = str | Fields[str, Any] | list[Any] | Mapping

# fmt: off
_STRINGS: Final = ["string"]
_STRING_MAP: Final = Mapping("string")
_NAMED_OPTIONAL: Final = {"name": "string", "optional": "boolean"}
_KEY_SELECTOR: Final = {"key!": "string", **_NAMED_OPTIONAL}
_KEY_TO_PATH: Final = {"key!": "string", "mode": "integer", "path!": "string"}
_PROBE: Final = {
    "exec": {"command": _STRINGS}, "grpc": {"port": "integer", "service": "string"},
    "httpGet": {
        "host": "string", "httpHeaders": [{"name!": "string", "value!": "string"}], "path": "string", "port": "int-or-string",
        "scheme": "string",
    },
    "tcpSocket": {"host": "string", "port": "int-or-string"}, "initialDelaySeconds": "integer", "periodSeconds": "integer",
    "timeoutSeconds": "integer", "successThreshold": "integer", "failureThreshold": "integer",
}
_ENV: Final = {
    "name!": "string", "value": "string",
    "valueFrom": {
        "configMapKeyRef": _KEY_SELECTOR, "secretKeyRef": _KEY_SELECTOR, "fieldRef": "any", "resourceFieldRef": "any",
    },
}
_SECURITY_CONTEXT: Final = {
    "allowPrivilegeEscalation": "boolean", "capabilities": {"add": _STRINGS, "drop": _STRINGS}, "privileged": "boolean",
    "readOnlyRootFilesystem": "boolean", "runAsGroup": "integer", "runAsNonRoot": "boolean", "runAsUser": "integer",
    "seccompProfile": {"localhostProfile": "string", "type!": "string"},
}
_CONTAINER: Final = {
    "args": _STRINGS, "command": _STRINGS, "env": [_ENV],
    "envFrom": [{"configMapRef": _NAMED_OPTIONAL, "prefix": "string", "secretRef": _NAMED_OPTIONAL}], "image": "string",
    "imagePullPolicy": "string", "livenessProbe": _PROBE, "name": "string",
    "ports": [{"containerPort": "integer", "name": "string", "protocol": "string"}], "readinessProbe": _PROBE,
    "resources": {"limits": Mapping("quantity"), "requests": Mapping("quantity")}, "securityContext": _SECURITY_CONTEXT,
    "startupProbe": _PROBE, "terminationMessagePath": "string", "terminationMessagePolicy": "string",
    "volumeMounts": [
        {"mountPath!": "string", "mountPropagation": "string", "name!": "string", "readOnly": "boolean", "subPath": "string"},
    ],
    "workingDir": "string",
}
_PROJECTION: Final = {
    "configMap": {"items": [_KEY_TO_PATH], **_NAMED_OPTIONAL},
    "downwardAPI": {
        "items": [
            {
                "fieldRef": {"apiVersion": "string", "fieldPath!": "string"}, "mode": "integer", "path!": "string",
                "resourceFieldRef": {"containerName": "string", "divisor": "quantity", "resource!": "string"},
            },
        ],
    },
    "secret": {"items": [_KEY_TO_PATH], **_NAMED_OPTIONAL},
    "serviceAccountToken": {"audience": "string", "expirationSeconds": "integer", "path!": "string"},
}
_VOLUME: Final = {
    "name!": "string", "configMap": {"defaultMode": "integer", "items": [_KEY_TO_PATH], **_NAMED_OPTIONAL}, "csi": "any",
    "emptyDir": {"medium": "string", "sizeLimit": "quantity"}, "ephemeral": "any", "hostPath": "any", "image": "any",
    "persistentVolumeClaim": "any", "projected": {"defaultMode": "integer", "sources": [_PROJECTION]},
    "secret": {"defaultMode": "integer", "items": [_KEY_TO_PATH], "optional": "boolean", "secretName": "string"},
}
_REVISION_SPEC: Final = {
    "affinity": "any", "automountServiceAccountToken": "boolean", "containerConcurrency": "integer",
    "containers!": [_CONTAINER], "dnsConfig": "any", "dnsPolicy": "string", "enableServiceLinks": "boolean",
    "hostAliases": ["any"], "hostIPC": "boolean", "hostNetwork": "boolean", "hostPID": "boolean",
    "idleTimeoutSeconds": "integer", "imagePullSecrets": [{"name": "string"}], "initContainers": ["any"],
    "nodeSelector": _STRING_MAP, "priorityClassName": "string", "responseStartTimeoutSeconds": "integer",
    "runtimeClassName": "string", "schedulerName": "string", "securityContext": "any", "serviceAccountName": "string",
    "shareProcessNamespace": "boolean", "timeoutSeconds": "integer", "tolerations": ["any"],
    "topologySpreadConstraints": ["any"], "volumes": [_VOLUME],
}
_TRAFFIC_TARGET: Final = {
    "configurationName": "string", "latestRevision": "boolean", "percent": "integer", "revisionName": "string", "tag": "string",
    "url": "string",
}
_METADATA: Final = {
    "annotations": _STRING_MAP, "creationTimestamp": "any", "deletionGracePeriodSeconds": "any", "deletionTimestamp": "any",
    "finalizers": _STRINGS, "generateName": "string", "generation": "any", "labels": _STRING_MAP, "managedFields": "any",
    "name": "string", "namespace": "string", "ownerReferences": "any", "resourceVersion": "any", "selfLink": "any",
    "uid": "any",
}
SERVICE: Final[Schema] = {
    "apiVersion": "string", "kind": "string", "metadata": _METADATA,
    "spec": {"template": {"metadata": _METADATA, "spec": _REVISION_SPEC}, "traffic": [_TRAFFIC_TARGET]}, "status": "any",
}
# fmt: on


def unknown_fields(value: object, schema: Schema = SERVICE, at: str = "") -> Violations:
    """Yields every field in `value` that the schema lacks, like the API server's strict field validation. at: its path."""
    if isinstance(schema, Fields) and isinstance(value, dict):
        fields = {name.rstrip("!"): field for name, field in schema.items()}
        for name, item in value.items():
            if name in fields:
                yield from unknown_fields(item, fields[name], _join(at, name))
            else:
                yield Violation(_join(at, name), f'unknown field "{_join(at, name)}"')
    elif isinstance(schema, list) and isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown_fields(item, schema[0], f"{at}[{index}]")


def as_decoded(value: Any, schema: Schema = SERVICE) -> Any:
    """Returns a copy in which nulls are as Go reads them: absent in an object, zero values in a list or in a map.

    Knative's webhook passes every object through its Go types before anything is validated.
    """
    if isinstance(schema, Fields) and isinstance(value, dict):
        fields = {name.rstrip("!"): field for name, field in schema.items()}
        return {name: as_decoded(item, fields.get(name, "any")) for name, item in value.items() if item is not None}
    if isinstance(schema, Mapping) and isinstance(value, dict):
        return {name: _zero(schema.values) if item is None else item for name, item in value.items()}
    if isinstance(schema, list) and isinstance(value, list):
        return [_zero(schema[0]) if item is None else as_decoded(item, schema[0]) for item in value]
    return value


def _zero(schema: Schema) -> Any:
    if schema == "quantity":
        return 0
    return "" if schema == "string" else {}


def wrong_types(value: object, schema: Schema = SERVICE, at: str = "") -> Violations:
    """Yields every value whose type is not the schema's, and every required field that is absent. at: path of `value`."""
    if isinstance(schema, str):
        if not _is_of(value, schema):
            yield Violation(at, f"Invalid value: {_type_name(value)}: must be of type {schema}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            yield Violation(at, f"Invalid value: {_type_name(value)}: must be of type array")
            return
        for index, item in enumerate(value):
            yield from wrong_types(item, schema[0], f"{at}[{index}]")
    elif not isinstance(value, dict):
        yield Violation(at or "object", f"Invalid value: {_type_name(value)}: must be of type object")
    elif isinstance(schema, Mapping):
        for name, item in value.items():
            yield from wrong_types(name, "string", f"{at}.{name}")
            yield from wrong_types(item, schema.values, f"{at}.{name}")
    else:
        for name, field in schema.items():
            key = name.rstrip("!")
            if key in value:
                yield from wrong_types(value[key], field, _join(at, key))
            elif name.endswith("!"):
                yield Violation(_join(at, key), "Required value")


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _is_of(value: object, name: str) -> bool:
    integer = isinstance(value, int) and not isinstance(value, bool)
    if name == "quantity":
        return not isinstance(value, bool) and bool(QUANTITY.fullmatch(str(value)))
    return {
        "any": True,
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "integer": integer,
        "int-or-string": integer or isinstance(value, str),
    }[name]


def _type_name(value: object) -> str:
    """The type and the beginning of a value, as messages of the API server have them."""
    if value is None:
        return '"null"'
    if isinstance(value, bool):
        return f'"boolean" ({str(value).lower()})'
    for python, name in ((int, "integer"), (float, "number"), (str, "string"), (list, "array"), (dict, "object")):
        if isinstance(value, python):
            return f'"{name}" ({str(value)[:40]})'
    return f'"{type(value).__name__}"'
