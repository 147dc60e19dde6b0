"""What a network costs, against sums made by hand."""

import pytest
from click.testing import CliRunner

from knative.__main__ import main
from knative.spec.cut import cut_evenly
from knative.spec.model_shape import shape_from_folder
from knative.spec.sizing import Link, network_plan, plan_stages
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


def test_bytes_go_to_the_gateway_and_on_and_take_their_time() -> None:
    plan = network_plan(PLANS, STEPS, 1, 8, Link(0.0, 12.5e6))
    assert plan.bytes_per_token == 3 * 2 * 10240
    assert plan.round_seconds == pytest.approx(0.04 + 3 * 2 * 10240 / 12.5e6)


def test_many_conversations_hide_a_delay_behind_each_others_passes() -> None:
    """64 in micro-batches of 8: as many micro-batches as the network allows are under way while others compute."""
    near, far = (network_plan(PLANS, STEPS, 64, 8, Link(delay, None)) for delay in (0.0, 0.005))
    assert near.micro_batches == 8
    assert far.tokens_per_second >= 0.99 * near.tokens_per_second
    alone = network_plan(PLANS, STEPS, 1, 8, Link(0.005, None))
    assert alone.tokens_per_second == pytest.approx(0.5 * network_plan(PLANS, STEPS, 1, 8, LOCAL).tokens_per_second)


def test_plan_says_what_a_network_costs() -> None:
    arguments = ["plan", "--model", str(ROOT / "examples" / "llama-2-13b"), "--stages", "4", "--step-seconds", "0.04"]
    outcome = CliRunner().invoke(main, [*arguments, "--delay-seconds", "0.005", "--conversations", "64"])
    assert outcome.exit_code == 0, outcome.output
    lines = [line for line in outcome.output.splitlines() if line.startswith("network: ")]
    assert lines[0].startswith("network: 1 at a time, one replica each: 12.5 tokens/s, 0.50 of the speed without it;")
    assert lines[1].endswith("bytes a token between pods 61440")
    outcome = CliRunner().invoke(main, [*arguments, "--wire-dtype", "int8"])
    assert "a hop carries 5124 bytes per token" in outcome.output
    assert outcome.output.rstrip().endswith("bytes a token between pods 30744")
