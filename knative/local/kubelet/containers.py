"""Reads from a Service's template the container to run here: command, environment, limits and probes."""

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from knative.local.errors import UnsupportedManifest
from knative.local.kubelet.probes import Probe, read_probe, readiness_probe
from knative.local.proxies.queue_proxy import FULL_DUPLEX_ANNOTATION, RequestLimits
from knative.local.proxies.timeouts import Timeouts
from knative.webhook.values import parse_quantity

NamedData = Mapping[str, Mapping[str, str]]  # Secrets or ConfigMaps: name → key → value

LAMINA_FUNCTION: Final = (sys.executable, "-m", "functions")  # the entrypoint of Lamina's own image
# Variables that a container image would set. Pods get no others of the platform's own environment.
_INHERITED: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONPATH")
_DEFAULT_TIMEOUT_SECONDS: Final = 300
_DEFAULT_RESPONSE_START_SECONDS: Final = 300


@dataclass(frozen=True, slots=True)
class LocalData:
    """What pods get on one machine in place of a cluster's Secrets, ConfigMaps, DNS and ServiceAccount."""

    secrets: NamedData
    config_maps: NamedData
    replacements: Mapping[str, str]  # cluster-local URL → local URL, replaced in every value, in place of cluster DNS
    in_cluster: Mapping[str, str]  # environment in place of a ServiceAccount; docs/reference.md, LAMINA_KUBERNETES_API
    secret_folders: Mapping[str, Path] = field(default_factory=dict)  # Secret → folder with a file for each key
    entrypoint: tuple[str, ...] = LAMINA_FUNCTION  # command of containers that name none; (): they are refused


@dataclass(frozen=True, slots=True)
class Container:
    """A container to run here: command, environment, probes and limits. Its port is chosen at each start of its process."""

    command: tuple[str, ...]
    environ: Mapping[str, str]
    readiness: Probe
    liveness: Probe | None
    limits: RequestLimits
    memory_limit_bytes: int | None


def write_secrets(secrets: NamedData, given: Mapping[str, Path], parent: Path) -> dict[str, Path]:
    """Returns the folder of each Secret, for pods that mount it.

    given: folders that exist already and are used as they are. Other Secrets are written into new folders in `parent`.
    """
    folders = {name: folder.resolve() for name, folder in given.items()}
    for name in set(secrets) - set(given):
        folders[name] = parent / name
        folders[name].mkdir()
        for key, value in secrets[name].items():
            (folders[name] / key).write_text(value, encoding="utf-8")
    return folders


def read_data_folder(folder: Path | None) -> NamedData:
    """Reads Secrets or ConfigMaps laid out as Kubernetes mounts them: a folder for each, a file for each key.

    Returns an empty dict if `folder` is None.
    """
    if folder is None:
        return {}
    return {
        each.name: {file.name: file.read_text(encoding="utf-8").strip() for file in each.iterdir() if file.is_file()}
        for each in folder.iterdir()
        if each.is_dir()
    }


def data_folders(folder: Path | None) -> dict[str, Path]:
    """Maps the name of each Secret that `read_data_folder` reads to its folder."""
    return {} if folder is None else {each.name: each for each in folder.iterdir() if each.is_dir()}


def read_container(template: Mapping[str, Any], local: LocalData, knative_environ: Mapping[str, str]) -> Container:
    """Reads the only container of a Service's `spec.template`. Raises UnsupportedManifest, which names the field.

    knative_environ: variables that Knative itself sets.
    """
    pod = template["spec"]
    if len(pod["containers"]) != 1:
        raise UnsupportedManifest("spec.template.spec.containers: only one container is run on one machine")
    container = pod["containers"][0]
    entrypoint = container.get("command") or local.entrypoint
    if not entrypoint:
        raise UnsupportedManifest(
            "spec.template.spec.containers[0].command: images are not run on one machine; set the command to run instead"
        )
    limits = container.get("resources", {}).get("limits", {})
    annotations = template.get("metadata", {}).get("annotations") or {}
    environ = _environ(container, local, _mounts(pod, container, local))
    if "cpu" in limits:
        environ |= _thread_environ(container, _quantity(limits["cpu"], "cpu"))
    return Container(
        command=(*entrypoint, *(container.get("args") or ())),
        environ=environ | dict(knative_environ),
        readiness=readiness_probe(container),
        liveness=read_probe(container, "livenessProbe"),
        limits=RequestLimits(
            container_concurrency=int(pod.get("containerConcurrency") or 0),
            timeouts=_timeouts(pod),
            full_duplex=annotations.get(FULL_DUPLEX_ANNOTATION, "").lower() == "enabled",
        ),
        memory_limit_bytes=int(_quantity(limits["memory"], "memory")) if "memory" in limits else None,
    )


def _timeouts(pod: Mapping[str, Any]) -> Timeouts:
    """The time limits in a pod's spec, else Knative's defaults (config-defaults).

    The default for the start of the response applies only if it is shorter than `timeoutSeconds`.
    """
    timeout, start = float(pod.get("timeoutSeconds") or _DEFAULT_TIMEOUT_SECONDS), pod.get("responseStartTimeoutSeconds")
    if start is None:
        start = _DEFAULT_RESPONSE_START_SECONDS if timeout > _DEFAULT_RESPONSE_START_SECONDS else 0
    return Timeouts(timeout, float(start), float(pod.get("idleTimeoutSeconds") or 0))


def _mounts(pod: Mapping[str, Any], container: Mapping[str, Any], local: LocalData) -> dict[str, str]:
    """Path at which the container mounts each Secret → the Secret's folder on this machine.

    Values of the container's environment that name the path get the folder instead.
    """
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod.get("volumes") or () if "secret" in volume}
    found = {}
    for mount in container.get("volumeMounts") or ():
        name = secrets.get(mount["name"])
        if name is not None and name not in local.secret_folders:
            raise UnsupportedManifest(f"volumes: the Secret {name!r} is not here{_known_names(local.secrets)}")
        if name is not None:
            found[mount["mountPath"]] = str(local.secret_folders[name])
    return found


def _environ(container: Mapping[str, Any], local: LocalData, mounts: Mapping[str, str]) -> dict[str, str]:
    environ = {key: os.environ[key] for key in _INHERITED if key in os.environ}
    for source in container.get("envFrom") or ():
        environ |= _whole_source(source, local)
    for entry in container.get("env") or ():
        value = _value(entry, local)
        if value is not None:
            for text, replacement in {**local.replacements, **mounts}.items():
                value = value.replace(text, replacement)
            environ[entry["name"]] = value
    if environ.get("LAMINA_KUBERNETES_API") == "cluster":
        return {**environ, **local.in_cluster}
    if "LAMINA_POD_PORT" in environ:  # a stage, which follows pods but asks no API
        return {**environ, **{name: value for name, value in local.in_cluster.items() if name.startswith("LAMINA_POD_")}}
    return environ


def _whole_source(source: Mapping[str, Any], local: LocalData) -> dict[str, str]:
    """The variables of one `envFrom` entry: every key of a Secret or ConfigMap."""
    prefix = source.get("prefix") or ""
    for kind, known in (("secretRef", local.secrets), ("configMapRef", local.config_maps)):
        if reference := source.get(kind):
            found = known.get(reference["name"])
            if found is None and not reference.get("optional"):
                raise UnsupportedManifest(f"envFrom.{kind}: {reference['name']!r} is not here{_known_names(known)}")
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
                raise UnsupportedManifest(
                    f"env {entry['name']}: {kind} {name!r} with key {key!r} is not here{_known_names(known)}"
                )
            return found
    raise UnsupportedManifest(f"env {entry['name']}: {sorted(source)} is neither secretKeyRef nor configMapKeyRef")


def _thread_environ(container: Mapping[str, Any], cores: float) -> dict[str, str]:
    """Variables that tell libraries how many threads to use, because no cgroup enforces the CPU limit here.

    OMP_NUM_THREADS is left out if the container sets it, LAMINA_THREADS unless the container sets it to 0.
    """
    threads = str(max(1, math.ceil(cores)))
    own = {entry["name"]: entry.get("value") for entry in container.get("env") or ()}
    openmp = {"OMP_NUM_THREADS": threads} if "OMP_NUM_THREADS" not in own else {}
    return openmp | ({"LAMINA_THREADS": threads} if own.get("LAMINA_THREADS") == "0" else {})


def _quantity(text: str, name: str) -> float:
    try:
        return float(parse_quantity(text))
    except ValueError as error:
        raise UnsupportedManifest(f"resources.limits.{name}: {error}") from error


def _known_names(known: NamedData) -> str:
    return f"; there are {', '.join(sorted(known))}" if known else "; there are none"
