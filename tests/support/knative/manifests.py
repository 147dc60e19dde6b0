"""Manifests for tests of checks, rendering and deploying: Knative Services, pipelines of three stages, other objects."""

from pathlib import Path
from typing import Any

import msgspec
import yaml
from click.testing import CliRunner

from knative.__main__ import main
from knative.render.rendering import render
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.spec.cut import parse_cut
from knative.spec.fleet_spec import FleetSpec
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.spec_file import spec_from_dict

DIGEST, OTHER_DIGEST = "d" * 64, "e" * 64
MONITORING = {"monitoring.coreos.com/v1": {"PodMonitor": "podmonitors", "PrometheusRule": "prometheusrules"}}
OF_CHAT = {"app.kubernetes.io/instance": "chat", "app.kubernetes.io/managed-by": "lamina"}  # labels of a pipeline's objects


def resource(
    kind: str,
    name: str,
    api_version: str = "v1",
    *,
    namespace: str = "default",
    labels: dict[str, str] | None = None,
    **fields: Any,
) -> KubernetesObject:
    """Any object. fields: those beside its metadata."""
    metadata = {"name": name, "namespace": namespace, "labels": labels or {}}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **fields}


def secret(name: str, *keys: str) -> KubernetesObject:
    return resource("Secret", name, data=dict.fromkeys(keys, "eA=="))


def features(**flags: str) -> KubernetesObject:
    """The ConfigMap with Knative's feature flags."""
    return resource("ConfigMap", "config-features", namespace="knative-serving", data=flags)


def service(
    spec: dict[str, Any] | None = None,
    container: dict[str, Any] | None = None,
    *,
    annotations: dict[Any, Any] | None = None,
    name: str = "v",
    **metadata: Any,
) -> dict[str, Any]:
    """A minimal Service that Knative accepts, with additions to its revision's spec and its one container."""
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": name, **metadata},
        "spec": {
            "template": {
                "metadata": {"annotations": annotations or {}},
                "spec": {"containers": [{"image": "registry.example/app:v1", **(container or {})}], **(spec or {})},
            }
        },
    }


def document(**changes: Any) -> dict[str, Any]:
    """A minimal spec of a pipeline, whose model is in no store. changes: of its fields; None removes a field."""
    fields = {
        "name": "chat",
        "model": {"name": "smollm2"},
        "cut": "0:10,10:20,20:30",
        "image": "registry.example/lamina:1",
        "store": {"endpoint": "http://store.example:9000"},
        **changes,
    }
    return {key: value for key, value in fields.items() if value is not None}


def member_document(name: str, **changes: Any) -> dict[str, Any]:
    """A minimal spec of a member of a fleet, which serves the model of its name."""
    fields = {"name": name, "model": {"name": name, "digest": DIGEST}, "cut": "0:10,10:20,20:30", **changes}
    return {key: value for key, value in fields.items() if value is not None}


def fleet_document(**changes: Any) -> dict[str, Any]:
    """A minimal fleet."""
    own = {
        "kind": "Fleet",
        "name": "models",
        "image": "registry.example/lamina:1",
        "store": {"endpoint": "http://store.example:9000"},
        "members": [member_document("code")],
    }
    return own | changes


def fleet_of(**changes: Any) -> FleetSpec:
    return msgspec.convert(fleet_document(**changes), FleetSpec)


def fleet_members(*names: str) -> list[ResolvedPipeline]:
    """Members of the fleet `models`."""
    shared = {"pipeline_token_secret": "models-pipeline"}
    specs = [spec_from_dict(document(**member_document(name), **shared)) for name in names]
    return [ResolvedPipeline(spec, parse_cut(spec.cut or ""), DIGEST, fleet="models") for spec in specs]


def resolved_pipeline(digest: str = DIGEST, **changes: Any) -> ResolvedPipeline:
    spec = spec_from_dict(document(**changes))
    return ResolvedPipeline(spec, parse_cut(spec.cut or ""), digest)


def objects(digest: str = DIGEST, **changes: Any) -> list[KubernetesObject]:
    """All objects of a pipeline, in the order in which they are applied."""
    return [each for rendered in render(resolved_pipeline(digest, **changes)).values() for each in rendered]


def other(**changes: Any) -> list[KubernetesObject]:
    """The same pipeline with another model."""
    return objects(OTHER_DIGEST, **changes)


def container_of(service: KubernetesObject) -> dict[str, Any]:
    container: dict[str, Any]
    (container,) = service["spec"]["template"]["spec"]["containers"]
    return container


def environment_of(service: KubernetesObject) -> dict[str, str]:
    """The container's environment as a function reads it; every secret is `secret`."""
    found = {entry["name"]: entry.get("value", "secret") for entry in container_of(service)["env"]}
    if "LAMINA_LIMITS_STORE" in found:
        found["LAMINA_LIMITS_STORE"] = "redis://secret:6379"
    return found | {"PORT": "8080", "AWS_ACCESS_KEY_ID": "secret", "AWS_SECRET_ACCESS_KEY": "secret"}


def rendered_folder(tmp_path: Path, *arguments: str, **changes: Any) -> Path:
    """The folder that `render --output` writes for a spec in tmp_path/pipeline.yaml. changes: of the spec's fields."""
    spec, out = tmp_path / "pipeline.yaml", tmp_path / "manifests"
    spec.write_text(yaml.safe_dump(document(model={"name": "smollm2", "digest": DIGEST}, **changes)))
    result = CliRunner().invoke(main, ["render", str(spec), "--output", str(out), *arguments])
    assert result.exit_code == 0, result.output
    return out


def stage_name(rendered: list[KubernetesObject], index: int) -> str:
    return next(each["metadata"]["name"] for each in rendered if each["metadata"]["name"].endswith(f"-s{index}"))


def names_of(rendered: list[KubernetesObject], kind: str = "Service") -> list[str]:
    return sorted(each["metadata"]["name"] for each in rendered if each["kind"] == kind)
