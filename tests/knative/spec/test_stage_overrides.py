"""Stages that differ from `stage`, and the gateway's own defaults."""

from typing import Any

import pytest

from knative.spec.cut import parse_cut
from knative.spec.errors import SpecError
from knative.spec.pipeline_spec import PipelineSpec, StageSpec
from knative.spec.spec_file import spec_from_dict
from tests.support.knative.manifests import document

CUT = parse_cut("0:10,10:20,20:30")


def spec(*overrides: Any, **changes: Any) -> PipelineSpec:
    return spec_from_dict(document(stage_overrides=list(overrides), **changes))


def test_stages_are_equal_without_overrides() -> None:
    assert spec().stages_of(CUT) == (StageSpec(),) * 3


def test_overrides_select_stages_by_number_or_by_layers() -> None:
    first, second, third = spec(
        {"layers": "10:30", "resources": {"memory": "8Gi", "gpu": 1}, "device": "cuda", "autoscaling": {"max_scale": 4}},
        {"stage": 2, "resources": {"memory": "12Gi"}, "autoscaling": {"target": 3}, "pod": {"node_selector": {"gpu": "large"}}},
        stage={"resources": {"cpu": "2"}, "autoscaling": {"min_scale": 1}, "pod": {"labels": {"team": "a"}}},
    ).stages_of(CUT)
    assert (first.resources.cpu, first.resources.memory, first.resources.gpu, first.device) == ("2", "2Gi", 0, "auto")
    assert (second.resources.cpu, second.resources.memory, second.resources.gpu, second.device) == ("2", "8Gi", 1, "cuda")
    assert (third.resources.cpu, third.resources.memory, third.resources.gpu, third.device) == ("2", "12Gi", 1, "cuda")
    scales = [
        (each.autoscaling.min_scale, each.autoscaling.max_scale, each.autoscaling.target) for each in (first, second, third)
    ]
    assert scales == [(1, 10, None), (1, 4, None), (1, 4, 3)]
    assert (second.pod.node_selector, third.pod.node_selector, third.pod.labels) == ({}, {"gpu": "large"}, {"team": "a"})


def test_null_resets_a_field() -> None:
    stages = spec({"stage": 0, "weights_cache": None}, stage={"weights_cache": "/cache"}).stages_of(CUT)
    assert [each.weights_cache for each in stages] == [None, "/cache", "/cache"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"stage": 3, "device": "cpu"}, r"\.stage: 3 is not one of the 3 stages, which are numbered from 0"),
        ({"stage": True, "device": "cpu"}, r"\.stage: True is not one of the 3 stages"),
        ({"layers": "0:15", "device": "cpu"}, r"\.layers: 0:15 does not begin and end with stages of the cut 0:10,10:20,20:30"),
        ({"layers": "all", "device": "cpu"}, r"\.layers: 'all' is not a range of layers such as '0:10'"),
    ],
)
def test_an_override_must_select_stages_of_the_cut(override: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec(override).stages_of(CUT)


def test_changing_one_field_of_a_gateway_keeps_its_other_defaults() -> None:
    """One changed number used to replace the others by the stages' defaults: eight answers at a time, target 2."""
    gateway = spec(gateway={"autoscaling": {"min_scale": 1}, "resources": {"memory": "1Gi"}}).gateway
    scaling = gateway.autoscaling
    assert (scaling.min_scale, scaling.max_scale, scaling.container_concurrency, scaling.target) == (1, 3, 0, None)
    assert scaling.default_target == 100
    assert (gateway.resources.cpu, gateway.resources.memory) == ("500m", "1Gi")


def test_stages_may_have_different_dtypes() -> None:
    mixed = spec({"stage": 0, "dtype": "int8"}, {"layers": "20:30", "dtype": "q4"})
    assert mixed.dtypes_of(CUT) == ("int8", "bfloat16", "q4")
    assert mixed.dtypes == ("bfloat16", "int8", "q4"), "the dtypes that push --spec publishes"
    assert spec().dtypes == ("bfloat16",)
