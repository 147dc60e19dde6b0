"""Pipelines for tests of rendering and deploying; their model is in no store."""

from typing import Any

from knative.render.rendering import render
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.spec.cut import parse_cut
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.spec_file import spec_from_dict

DIGEST = "d" * 64


def document(**changes: Any) -> dict[str, Any]:
    """A minimal spec with changes to its fields; None removes a field."""
    fields = {
        "name": "chat",
        "model": {"name": "smollm2"},
        "cut": "0:10,10:20,20:30",
        "image": "registry.example/lamina:1",
        "store": {"endpoint": "http://store.example:9000"},
        **changes,
    }
    return {key: value for key, value in fields.items() if value is not None}


def resolved_pipeline(digest: str = DIGEST, **changes: Any) -> ResolvedPipeline:
    spec = spec_from_dict(document(**changes))
    return ResolvedPipeline(spec, parse_cut(spec.cut or ""), digest)


def rendered_pipeline(digest: str = DIGEST, **changes: Any) -> list[KubernetesObject]:
    """All objects, in the order in which they are applied."""
    return [each for objects in render(resolved_pipeline(digest, **changes)).values() for each in objects]
