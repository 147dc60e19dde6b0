"""Profiles: computed from bytes and arithmetic over published figures, or fitted with a stated error."""

from pathlib import Path

import msgspec
import pytest

from bench.evaluation.experiments import setting_13b
from bench.evaluation.fitting import Point, fit_profile
from bench.evaluation.profile import (
    DoesNotFit,
    ProfileInvalid,
    UnknownDevice,
    kv_tokens_beside,
    read_device,
    read_profile,
    roofline,
)
from bench.evaluation.setting import OBJECTIVE
from functions.configuration.pass_times import PassTimes, pairs
from knative.spec.model_shape import shape_from_folder
from tests.support.paths import ROOT

SHAPE = shape_from_folder(ROOT / "examples" / "llama-2-13b", "bfloat16")
TRUE = {"fixed": 0.001, "layer": 0.0005, "row": 0.000005, "kv": 1e-7, "token": 0.00004, "pair": 1e-8}
POINTS = [
    Point(layers, rows, length, held, seconds)
    for layers in (4, 12)
    for held in (64, 512)
    for rows, length, seconds in (
        *(
            (rows, 1, TRUE["fixed"] + layers * (TRUE["layer"] + TRUE["row"] * rows + TRUE["kv"] * rows * (held + 1)))
            for rows in (1, 4, 16)
        ),
        *(
            (1, length, TRUE["fixed"] + layers * (TRUE["token"] * length + TRUE["pair"] * pairs(held, length)))
            for length in (64, 256)
        ),
    )
]
HEADS = [(1, 0.003), (16, 0.008)]


def test_a_step_of_the_whole_model_streams_its_weights_once() -> None:
    """26 GB of bf16 over 75 % of 0.864 TB/s are 40 ms, and a prompt of 512 tokens 2 · 13e9 · 512 FLOPs."""
    device = read_device("l40s")
    times = roofline(SHAPE, device, "l40s").of_stage(0, 40, 40)
    step = times.forward_seconds(1, 1, 0) + times.logits_seconds(1)
    assert step == pytest.approx(0.0018 + 25.7e9 / (0.75 * 0.864e12), rel=0.01)
    assert times.forward_seconds(512, 0, 0) == pytest.approx(0.0018 + 2 * 12.7e9 * 512 / (0.5 * 362e12), rel=0.01)
    assert times.forward_seconds(8, 0, 8 * 1000) - times.forward_seconds(8, 0, 0) == pytest.approx(
        8000 * 40 * 2 * 5120 * 2 / (0.75 * 0.864e12), rel=0.01
    )


def test_stages_take_the_time_of_the_whole_model_and_a_pass_more_each() -> None:
    profile = roofline(SHAPE, read_device("l40s"), "l40s")
    whole = profile.of_stage(0, 40, 40)
    pieces = [profile.of_stage(first, first + 10, 40) for first in range(0, 40, 10)]
    together = sum(each.forward_seconds(8, 800, 800) + each.logits_seconds(8) for each in pieces)
    assert together == pytest.approx(whole.forward_seconds(8, 800, 800) + whole.logits_seconds(8) + 3 * profile.pass_seconds)
    assert [each.logits_stream_seconds > 0 for each in pieces] == [False, False, False, True]


def test_a_fit_recovers_the_profile_that_made_the_points() -> None:
    profile = fit_profile(POINTS, HEADS, "some", "made up")
    times = profile.of_stage(0, 10, 20)
    assert profile.worst_error is not None
    assert profile.worst_error < 0.01
    assert times.forward_seconds(16, 16 * 100, 16 * 100) == pytest.approx(
        TRUE["fixed"] + 10 * (TRUE["layer"] + 16 * TRUE["row"] + 1600 * TRUE["kv"]), rel=0.01
    )
    assert times.token_seconds == pytest.approx(10 * TRUE["token"], rel=0.01)


@pytest.mark.parametrize(
    ("points", "heads", "message"),
    [
        ([p for p in POINTS if p.layers == 4], HEADS, "steps were measured with layers 4 alone: add points of another layers"),
        ([p for p in POINTS if p.rows == 1], HEADS, "steps were measured with rows 1 alone"),
        ([p for p in POINTS if p.length != 64], HEADS, "prompt chunks were measured with length 256 alone"),
        ([p for p in POINTS if p.length > 1], HEADS, "steps were measured nowhere: add points"),
        (POINTS, HEADS[:1], "heads of 1 points: at least two"),
    ],
)
def test_points_that_do_not_determine_a_profile_are_refused(
    points: list[Point], heads: list[tuple[int, float]], message: str
) -> None:
    with pytest.raises(ProfileInvalid, match=message):
        fit_profile(points, heads, "some", "made up")


def test_packaged_profiles_are_read_and_incomplete_ones_are_refused(tmp_path: Path) -> None:
    for path in sorted((ROOT / "bench" / "evaluation" / "profiles").glob("*.yaml")):
        assert isinstance(read_profile(path).of_stage(0, 10, 30), PassTimes)
    profile = msgspec.to_builtins(fit_profile(POINTS, HEADS, "some", "made up"))
    del profile["layer_kv_token_seconds"]
    path = tmp_path / "some.yaml"
    path.write_bytes(msgspec.yaml.encode(profile))
    with pytest.raises(ProfileInvalid, match="missing required field `layer_kv_token_seconds`"):
        read_profile(path)


def test_a_device_that_is_not_known_and_a_stage_that_does_not_fit_are_refused() -> None:
    with pytest.raises(UnknownDevice, match="device 'abacus': there is h100-sxm"):
        read_device("abacus")
    with pytest.raises(DoesNotFit, match=r"whole: 26.0 GB of weights and 4096 tokens .* 24 GB.*cut the model into more stages"):
        kv_tokens_beside(26 * 10**9, 819_200, 24e9, 4096, "whole")
    assert kv_tokens_beside(26 * 10**9, 819_200, 48e9, 4096, "whole") == 20996


def test_the_objective_of_slow_devices_is_as_many_times_as_long() -> None:
    spec = setting_13b(slowness=3.0).spec(OBJECTIVE)
    assert spec.objective is not None
    assert (spec.objective.first_token_seconds, spec.objective.token_seconds) == (6.0, pytest.approx(0.6))
