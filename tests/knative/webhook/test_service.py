"""Metadata, traffic and shape of a Service; no value makes the webhook fail."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knative.webhook.check import is_knative_service, validate, warnings
from tests.support.knative.manifests import service


def fields(manifest: dict[str, Any]) -> set[str]:
    return {violation.field for violation in validate(manifest)}


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"name": "Upper"}, "metadata.name"),
        ({"name": "1st"}, "metadata.name"),
        ({"name": "a.b"}, "metadata.name"),
        ({"name": "x" * 64}, "metadata.name"),
        ({}, "metadata.name"),
        ({"generateName": "A-"}, "metadata.generateName"),
        ({"name": "v", "labels": {"a": "not a value"}}, "metadata.labels.a"),
        ({"name": "v", "labels": {"a b": "c"}}, "metadata.labels"),
        ({"name": "v", "annotations": {"a": 1}}, "metadata.annotations.a"),
        ({"name": "v", "label": {}}, "metadata.label"),
    ],
)
def test_metadata(metadata: dict[str, Any], field: str) -> None:
    assert fields(service() | {"metadata": metadata}) == {field}


def test_a_generated_name_may_end_in_a_dash() -> None:
    assert fields(service() | {"metadata": {"generateName": "stage-"}}) == set()


@pytest.mark.parametrize(("name", "good"), [("v-1", True), ("v", False), ("w-1", False), ("v-A", False)])
def test_revision_name(name: str, good: bool) -> None:
    manifest = service()
    manifest["spec"]["template"]["metadata"]["name"] = name
    assert fields(manifest) == (set() if good else {"spec.template.metadata.name"})


@pytest.mark.parametrize(
    ("traffic", "expected"),
    [
        ([], set()),
        ([{"percent": 100, "latestRevision": True}], set()),
        ([{"percent": 90, "revisionName": "v-1"}, {"percent": 10, "latestRevision": True, "tag": "next"}], set()),
        ([{"percent": 90, "revisionName": "v-1"}], {"spec.traffic"}),
        ([{"percent": 100, "revisionName": "v-1", "latestRevision": True}], {"spec.traffic[0].latestRevision"}),
        ([{"percent": 100, "latestRevision": False}], {"spec.traffic[0].latestRevision"}),
        ([{"percent": 100, "configurationName": "v"}], {"spec.traffic[0].configurationName"}),
        ([{"percent": 100, "url": "http://x"}], {"spec.traffic[0].url"}),
        ([{"percent": 100, "tag": "Not A Tag"}], {"spec.traffic[0].tag"}),
        ([{"percent": 100, "revisionName": "a b"}], {"spec.traffic[0].revisionName"}),
        ([{"percent": 101}, {"percent": -1}], {"spec.traffic[0].percent", "spec.traffic[1].percent"}),
        ([{"percent": 50, "tag": "a"}, {"percent": 50, "tag": "a"}], {"spec.traffic[0].tag", "spec.traffic[1].tag"}),
    ],
)
def test_traffic(traffic: list[dict[str, Any]], expected: set[str]) -> None:
    manifest = service()
    manifest["spec"]["traffic"] = traffic
    assert fields(manifest) == expected


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        (service() | {"apiVersion": "serving.knative.dev/v1alpha1"}, {"apiVersion"}),
        (service() | {"kind": "Route"}, {"kind"}),
        (service() | {"specs": {}}, {"specs"}),
        (service() | {"spec": {}}, {"spec.template.spec.containers"}),
        (service() | {"spec": None}, {"spec.template.spec.containers"}),
        (service() | {"spec": []}, {"spec"}),
        (service(annotations={"autoscaling.knative.dev/min-scale": None}), None),
        (service() | {"spec": {"template": {"spec": {}}}}, {"spec.template.spec.containers"}),
        (service({"containerConcurrency": "8"}), {"spec.template.spec.containerConcurrency"}),
        (service({"containerConcurrency": True}), {"spec.template.spec.containerConcurrency"}),
        (service(annotations={"autoscaling.knative.dev/min-scale": 1}), None),
        (service(annotations={1: "x"}), None),
    ],
)
def test_shape(manifest: dict[str, Any], expected: set[str] | None) -> None:
    found = fields(manifest)
    assert found
    assert expected is None or found == expected


def test_only_knative_services_are_recognized() -> None:
    assert is_knative_service(service())
    assert is_knative_service({"apiVersion": "serving.knative.dev/v1beta1", "kind": "Service"})
    assert not is_knative_service({"apiVersion": "v1", "kind": "Service"})
    assert not is_knative_service(["kind"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
RICH = service(
    {
        "timeoutSeconds": 300,
        "securityContext": {},
        "volumes": [{"name": "x", "emptyDir": {"sizeLimit": "1Gi"}}, {"name": "y", "projected": {"sources": []}}],
    },
    {
        "env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
        "ports": [{"containerPort": 8080}],
        "readinessProbe": {"httpGet": {"path": "/", "port": 8080}},
        "resources": {"limits": {"cpu": "1"}},
        "volumeMounts": [{"name": "x", "mountPath": "/x"}],
    },
    annotations={"autoscaling.knative.dev/target": "2"},
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    else:
        return []
    return [(value, key) for key, _ in pairs] + [place for _, item in pairs for place in places(item)]


@given(st.integers(min_value=0), JSON)
def test_any_value_in_any_place_gets_a_verdict(index: int, value: Any) -> None:
    manifest = copy.deepcopy(RICH)
    where = places(manifest)
    container, key = where[index % len(where)]
    container[key] = value
    if not validate(manifest):
        warnings(manifest)
