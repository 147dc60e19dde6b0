"""The table of the network experiment: shares, predictions and remedies, from results alone."""

import msgspec
import pytest
from msgspec.structs import replace

from bench.evaluation.network import NOTHING, REMEDIES, Lengths, Measured, Remedy, file_name, network_table, predicted
from knative.local.proxies.network import EmulatedNetwork
from knative.spec.cut import cut_evenly
from knative.spec.model_shape import shape_from_folder
from knative.spec.sizing import Link, network_plan, plan_stages
from tests.support.paths import ROOT

SHAPE = shape_from_folder(ROOT / "examples" / "llama-2-13b", "bfloat16")
PLANS = plan_stages(SHAPE, cut_evenly(SHAPE, 3))
STEPS = (0.01, 0.012, 0.01)


def measured(delay: float, at_once: int, remedy: Remedy, factor: float = 1.0) -> Measured:
    plan = network_plan(PLANS, STEPS, at_once, 8, Link(delay, None))
    return Measured(
        delay_seconds=delay,
        bytes_per_second=None,
        draft_tokens=remedy.draft_tokens,
        wire_dtype=remedy.wire_dtype,
        stages=remedy.stages,
        at_once=at_once,
        tokens_per_second=factor * plan.tokens_per_second,
        step_seconds=STEPS,
    )


def test_the_worst_prediction_error_is_reported() -> None:
    results = [measured(delay, at_once, NOTHING) for delay in (0.0, 0.005) for at_once in (1, 16)]
    remedied = [measured(0.005, 1, REMEDIES["drafts"], 2.0), measured(0.005, 1, REMEDIES["two stages"], 1.25)]
    table, verdict = network_table(PLANS, [*results, *remedied])
    assert table.splitlines()[0].endswith("| error | drafts | 8 bits | two stages |")
    assert "| 5 ms | any | 1 | 16.1 | 0.52 | 16.1 | +0% | 32.3 (2.00 ×) | – | 20.2 (1.25 ×) |" in table
    assert "off by at most 0%" in verdict
    _, verdict = network_table(PLANS, [*results[:2], measured(0.005, 1, NOTHING, 0.8)])
    assert "off by at most 25%" in verdict


def test_time_beyond_passes_is_added_to_a_networks_round() -> None:
    near = network_plan(PLANS, STEPS, 16, 8, Link(0.0, None))
    far = network_plan(PLANS, STEPS, 16, 8, Link(0.05, None))
    beside = 0.03
    slow = replace(measured(0.0, 16, NOTHING), tokens_per_second=16 / (near.round_seconds + beside))
    assert predicted(PLANS, slow, Link(0.05, None)) == pytest.approx(16 / (far.round_seconds + beside))


def test_prompts_are_predicted_on_a_slow_link() -> None:
    thin = Link(0.0, 1e6)
    without = measured(0.0, 1, NOTHING)
    asked = replace(without, prompt_tokens=100, answer_tokens=50)
    carried = network_plan(PLANS, STEPS, 1, 8, thin).bytes_per_token * 100 / 1e6
    seconds = 50 / predicted(PLANS, asked, thin) - 50 / predicted(PLANS, replace(asked, prompt_tokens=0), thin)
    assert seconds == pytest.approx(carried)


def test_each_remedy_has_its_own_file_and_older_files_are_read() -> None:
    names = {file_name(EmulatedNetwork(0.005), remedy, Lengths()) for remedy in (NOTHING, *REMEDIES.values())}
    assert len(names) == 4
    assert "network/0.005s-any-drafts-16-16x48.yaml" in names
    one = measured(0.005, 1, REMEDIES["drafts"])
    before = {key: value for key, value in msgspec.to_builtins(one).items() if key not in ("wire_dtype", "stages")}
    assert msgspec.convert(before, Measured) == one
