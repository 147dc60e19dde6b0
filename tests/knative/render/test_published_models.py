"""Published models of Kubernetes and Knative understand every field of every rendered example.

The models are generated from the projects' own API definitions. They drop fields that they do not know, so what they read is
written out again and compared.
"""

import importlib
import warnings
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from knative.local.platform import ROOT

MODULES: Final = {
    "v1": "kubernetes.core.v1",
    "rbac.authorization.k8s.io/v1": "kubernetes.rbac.v1",
    "policy/v1": "kubernetes.policy.v1",
    "networking.k8s.io/v1": "kubernetes.networking.v1",
    "serving.knative.dev/v1": "knative_serving.serving.v1",
    "eventing.knative.dev/v1": "knative_eventing.eventing.v1",
    "flows.knative.dev/v1": "knative_eventing.flows.v1",
    "monitoring.coreos.com/v1": "prometheus_operator.v1",
}
_RENDERED: Final = (ROOT / "examples").glob("*/rendered/*.yaml")
FILES: Final = sorted(path for path in _RENDERED if path.name != "kustomization.yaml")  # a file for a tool, no object


def readable(value: Any, key: str = "") -> Any:
    """Without what the models, not the APIs, stumble over.

    A quantity of digits alone is read as a number and then fails as a string. And `timeout` of a delivery is in no schema: it
    is a beta feature of Eventing, on by default, for which the CRDs keep fields that they do not name.
    """
    if isinstance(value, dict):
        return {k: readable(v, k) for k, v in value.items() if (key, k) != ("delivery", "timeout")}
    if isinstance(value, list):
        return [readable(each) for each in value]
    return f"{value}000m" if isinstance(value, str) and value.isdigit() and key in ("cpu", "nvidia.com/gpu") else value


def understood(manifest: dict[str, Any]) -> Any:
    """The manifest as its model has read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the models about their own fields
        module = importlib.import_module(f"cloudcoil.models.{MODULES[manifest['apiVersion']]}")
    model = getattr(module, manifest["kind"]).model_validate(manifest)
    return model.model_dump(by_alias=True, exclude_unset=True, mode="json")


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.parent.name}/{path.name}")
def test_no_field_of_a_rendered_object_is_unknown(path: Path) -> None:
    objects = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    assert objects
    for manifest in map(readable, objects):
        assert understood(manifest) == manifest


def test_the_examples_have_all_kinds() -> None:
    kinds = {each["kind"] for path in FILES for each in yaml.safe_load_all(path.read_text(encoding="utf-8"))}
    assert kinds >= {"Service", "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy", "Broker", "Trigger", "Sequence"}


@pytest.mark.parametrize("key", ["retries", "backOffDelay"])
def test_a_misspelt_field_would_be_found(key: str) -> None:
    broker = {
        "apiVersion": "eventing.knative.dev/v1",
        "kind": "Broker",
        "metadata": {"name": "chat"},
        "spec": {"delivery": {key: 1}},
    }
    assert understood(broker) != broker
