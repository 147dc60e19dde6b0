"""A Service's template → how its container is run here: command, environment, limits, probes."""

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from knative.local.errors import UnsupportedManifest
from knative.local.kubelet.probes import Probe, liveness_probe, readiness_probe
from knative.local.proxies.full_duplex import ANNOTATION as FULL_DUPLEX
from knative.local.proxies.queue_proxy import RequestLimits
from knative.local.proxies.timeouts import Timeouts
from knative.webhook.values import parse_quantity

NamedData = Mapping[str, Mapping[str, str]]
"""Secrets or config maps: name → key → value."""

FUNCTION: Final = (sys.executable, "-m", "functions")
"""What a container without a command of its own runs."""
_INHERITED: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONPATH")
"""What a container image would bring along; nothing else of the platform's environment reaches a pod."""
_DEFAULT_TIMEOUT_SECONDS: Final = 300
_DEFAULT_RESPONSE_START_SECONDS: Final = 300


@dataclass(frozen=True, slots=True)
class LocalData:
    """What stands for the cluster around a pod."""

    secrets: NamedData
    config_maps: NamedData
    replacements: Mapping[str, str]
    """Cluster-local URL → local URL, wherever it stands in a value: what cluster DNS does."""
    in_cluster: Mapping[str, str]
    """Environment instead of what a pod would find by its ServiceAccount; see docs/reference.md, LAMINA_KUBERNETES_API."""
    secret_folders: Mapping[str, Path] = field(default_factory=dict)
    """Secret → folder with a file for each key, which is what a volume of it is."""


@dataclass(frozen=True, slots=True)
class Container:
    """One container, ready to be run but for its port."""

    command: tuple[str, ...]
    environ: Mapping[str, str]
    readiness: Probe
    liveness: Probe | None
    limits: RequestLimits
    memory_limit_bytes: int | None


def read_container(template: Mapping[str, Any], local: LocalData, told: Mapping[str, str]) -> Container:
    """told: what Knative itself puts into the environment. Raises UnsupportedManifest, which names the field."""
    pod = template["spec"]
    if len(pod["containers"]) != 1:
        raise UnsupportedManifest("spec.template.spec.containers: only one container is run on one machine")
    container = pod["containers"][0]
    limits = container.get("resources", {}).get("limits", {})
    annotations = template.get("metadata", {}).get("annotations") or {}
    return Container(
        command=(*(container.get("command") or FUNCTION), *(container.get("args") or ())),
        environ=_environ(container, local, _mounts(pod, container, local)) | _threads(container, limits) | dict(told),
        readiness=readiness_probe(container),
        liveness=liveness_probe(container),
        limits=RequestLimits(
            container_concurrency=int(pod.get("containerConcurrency") or 0),
            timeouts=_timeouts(pod),
            full_duplex=annotations.get(FULL_DUPLEX, "").lower() == "enabled",
        ),
        memory_limit_bytes=int(_quantity(limits["memory"], "memory")) if "memory" in limits else None,
    )


def _timeouts(pod: Mapping[str, Any]) -> Timeouts:
    """With the defaults of config-defaults, which count where they are shorter than `timeoutSeconds`."""
    timeout, start = float(pod.get("timeoutSeconds") or _DEFAULT_TIMEOUT_SECONDS), pod.get("responseStartTimeoutSeconds")
    if start is None:
        start = _DEFAULT_RESPONSE_START_SECONDS if timeout > _DEFAULT_RESPONSE_START_SECONDS else 0
    return Timeouts(timeout, float(start), float(pod.get("idleTimeoutSeconds") or 0))


def _mounts(pod: Mapping[str, Any], container: Mapping[str, Any], local: LocalData) -> dict[str, str]:
    """Where a Secret is mounted → the folder that is there instead. A function finds its files by its environment alone."""
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod.get("volumes") or () if "secret" in volume}
    found = {}
    for mount in container.get("volumeMounts") or ():
        name = secrets.get(mount["name"])
        if name is not None and name not in local.secret_folders:
            raise UnsupportedManifest(f"volumes: the Secret {name!r} is not here{_have(local.secrets)}")
        if name is not None:
            found[mount["mountPath"]] = str(local.secret_folders[name])
    return found


def _environ(container: Mapping[str, Any], local: LocalData, mounts: Mapping[str, str]) -> dict[str, str]:
    environ = {key: os.environ[key] for key in _INHERITED if key in os.environ}
    for source in container.get("envFrom") or ():
        environ |= _whole(source, local)
    for entry in container.get("env") or ():
        value = _value(entry, local)
        if value is not None:
            environ[entry["name"]] = _local(value, {**local.replacements, **mounts})
    if environ.get("LAMINA_KUBERNETES_API") == "cluster":
        return {**environ, **local.in_cluster}
    if "LAMINA_POD_PORT" in environ:  # A stage, which follows pods and asks no API.
        return {**environ, **{name: value for name, value in local.in_cluster.items() if name.startswith("LAMINA_POD_")}}
    return environ


def _whole(source: Mapping[str, Any], local: LocalData) -> dict[str, str]:
    """An `envFrom` entry: every key of a Secret or ConfigMap."""
    prefix = source.get("prefix") or ""
    for kind, known in (("secretRef", local.secrets), ("configMapRef", local.config_maps)):
        if reference := source.get(kind):
            found = known.get(reference["name"])
            if found is None and not reference.get("optional"):
                raise UnsupportedManifest(f"envFrom.{kind}: {reference['name']!r} is not here{_have(known)}")
            return {prefix + key: value for key, value in (found or {}).items()}
    raise UnsupportedManifest(f"envFrom: {sorted(source)} is neither secretRef nor configMapRef")


def _value(entry: Mapping[str, Any], local: LocalData) -> str | None:
    source = entry.get("valueFrom")
    if source is None:
        return str(entry.get("value") or "")
    for kind, known in (("secretKeyRef", local.secrets), ("configMapKeyRef", local.config_maps)):
        if reference := source.get(kind):
            name, key = reference["name"], reference["key"]
            found = known.get(name, {}).get(key)
            if found is None and not reference.get("optional"):
                raise UnsupportedManifest(f"env {entry['name']}: {kind} {name!r} with key {key!r} is not here{_have(known)}")
            return found
    raise UnsupportedManifest(f"env {entry['name']}: {sorted(source)} is neither secretKeyRef nor configMapKeyRef")


def _local(value: str, replacements: Mapping[str, str]) -> str:
    for cluster_url, local_url in replacements.items():
        value = value.replace(cluster_url, local_url)
    return value


def _threads(container: Mapping[str, Any], limits: Mapping[str, str]) -> dict[str, str]:
    """No cgroup holds a process to its CPU limit here, so libraries are told; a function's own setting stays."""
    if "cpu" not in limits:
        return {}
    threads = str(max(1, math.ceil(_quantity(limits["cpu"], "cpu"))))
    said = {entry["name"]: entry.get("value") for entry in container.get("env") or ()}
    told = {"OMP_NUM_THREADS": threads} if "OMP_NUM_THREADS" not in said else {}
    return told | ({"LAMINA_THREADS": threads} if said.get("LAMINA_THREADS") == "0" else {})


def _quantity(text: str, name: str) -> float:
    try:
        return float(parse_quantity(text))
    except ValueError as error:
        raise UnsupportedManifest(f"resources.limits.{name}: {error}") from error


def _have(known: NamedData) -> str:
    return f"; there are {', '.join(sorted(known))}" if known else "; there are none"
