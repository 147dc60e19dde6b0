"""Sizing: pods for conversations, memory of a stage, and the cost of a network, compared with sums made by hand."""

import pytest
from click.testing import CliRunner

from eventing.wire.events import Cut
from knative.__main__ import main
from knative.spec.cut import cut_evenly, parse_cut
from knative.spec.errors import SpecError
from knative.spec.model_shape import shape_from_config, shape_from_folder
from knative.spec.pipeline_spec import StageSpec
from knative.spec.sizing import Link, check_memory, needed_bytes, network_plan, plan_stages, replicas_for
from knative.spec.spec_file import spec_from_dict
from tests.knative.spec.test_cut import SMOLLM2
from tests.support.knative.manifests import document
from tests.support.paths import ROOT

SHAPE = shape_from_folder(ROOT / "examples" / "llama-2-13b", "bfloat16")
PLANS = plan_stages(SHAPE, cut_evenly(SHAPE, 4))
STEPS = [0.01] * 4
LOCAL = Link(0.0, None)


def test_one_conversation_pays_every_link_both_ways_for_each_token() -> None:
    near, far = (network_plan(PLANS, STEPS, 1, 8, Link(delay, None)) for delay in (0.0, 0.005))
    assert near.round_seconds == pytest.approx(0.04)
    assert far.round_seconds == pytest.approx(0.04 + 4 * 2 * 0.005)
    assert far.tokens_per_second == pytest.approx(12.5)


def test_hidden_states_cross_two_links_per_hop() -> None:
    plan = network_plan(PLANS, STEPS, 1, 8, Link(0.0, 12.5e6))
    assert plan.bytes_per_token == 3 * 2 * 10240
    assert plan.round_seconds == pytest.approx(0.04 + 3 * 2 * 10240 / 12.5e6)


def test_many_conversations_hide_a_delay() -> None:
    """64 in micro-batches of 8: some micro-batches travel while others compute."""
    near, far = (network_plan(PLANS, STEPS, 64, 8, Link(delay, None)) for delay in (0.0, 0.005))
    assert near.micro_batches == 8
    assert far.tokens_per_second >= 0.99 * near.tokens_per_second
    alone = network_plan(PLANS, STEPS, 1, 8, Link(0.005, None))
    assert alone.tokens_per_second == pytest.approx(0.5 * network_plan(PLANS, STEPS, 1, 8, LOCAL).tokens_per_second)


def test_plan_shows_the_cost_of_a_network() -> None:
    arguments = ["plan", "--model", str(ROOT / "examples" / "llama-2-13b"), "--stages", "4", "--step-seconds", "0.04"]
    outcome = CliRunner().invoke(main, [*arguments, "--delay-seconds", "0.005", "--conversations", "64"])
    assert outcome.exit_code == 0, outcome.output
    lines = [line for line in outcome.output.splitlines() if line.startswith("network: ")]
    assert lines[0].startswith("network: 1 at a time, one replica each: 12.5 tokens/s, 0.50 of the speed without it;")
    assert lines[1].endswith("bytes a token between pods 61440")
    outcome = CliRunner().invoke(main, [*arguments, "--wire-dtype", "int8"])
    assert "a hop carries 5124 bytes per token" in outcome.output
    assert outcome.output.rstrip().endswith("bytes a token between pods 30744")


@pytest.mark.parametrize(
    ("cut", "conversations", "expected"),
    [
        (((0, 10), (10, 24), (24, 30)), 8, [1, 1, 1]),
        (((0, 10), (10, 24), (24, 30)), 128, [4, 5, 5]),
        (((0, 10), (10, 24), (24, 30)), 1280, [10, 10, 10]),
        (((0, 2), (2, 28), (28, 30)), 1, [1, 1, 1]),
        # Half of three micro-batches in one stage are above the target of one pod.
        (((0, 2), (2, 28), (28, 30)), 3, [1, 2, 1]),
    ],
)
def test_replicas_follow_the_compute_share(cut: Cut, conversations: int, expected: list[int]) -> None:
    plans = plan_stages(shape_from_config(SMOLLM2, "s", "bfloat16"), cut)
    assert replicas_for(plans, conversations, micro_batch=8, targets=[1.4] * 3, max_scales=[10] * 3) == expected


def stages(*overrides: dict[str, object], **stage: object) -> tuple[StageSpec, ...]:
    spec = spec_from_dict(document(stage_overrides=list(overrides), stage=stage))
    return spec.stages_of(parse_cut("0:10,10:20,20:30"))


def test_a_stage_with_too_little_memory_is_refused_with_the_sum() -> None:
    given = stages({"stage": 1, "kv_cache": "1Gi"}, kv_cache="512Mi", resources={"memory": "2Gi"})
    weights = [400 * 2**20] * 3
    assert needed_bytes(given[0], weights[0]) == 400 * 2**20 * 1.2 + 2**29 + 2**30
    check_memory(given[:1], weights[:1])
    sums = r"stage 1 has 2Gi and needs 2528 MiB: weights 400 MiB × 1\.2, kv_cache 1Gi and 1024 MiB for the rest"
    with pytest.raises(SpecError, match=sums):
        check_memory(given, weights)
    with pytest.raises(SpecError, match=r"adapters 900 MiB, kv_cache 512Mi"):
        check_memory(given[:1], weights[:1], [900 * 2**20])
    with pytest.raises(SpecError, match=r"stage 0 has 1Gi and needs 1536 MiB: weights \(size unknown here\)"):
        check_memory(stages(resources={"memory": "1Gi"}), [None] * 3)
    check_memory(stages(resources={"memory": "1Gi", "gpu": 1}), weights)
    check_memory(stages(layer_group="sleep"), [2**40] * 3)


@pytest.mark.parametrize(("dtype", "number_bytes"), [("float32", 4), ("bfloat16", 2), ("q4", 2)])
def test_an_adapter_of_all_linear_modules_takes_rank_times_their_inputs_and_outputs(dtype: str, number_bytes: int) -> None:
    plans = plan_stages(shape_from_config(SMOLLM2, "s", dtype), ((0, 10), (10, 30)))
    a_layer = (576 + 576) + 2 * (576 + 192) + (576 + 576) + 3 * (576 + 1536)
    assert [plan.adapter_bytes for plan in plans] == [10 * a_layer * number_bytes, 20 * a_layer * number_bytes]
