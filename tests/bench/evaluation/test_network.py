"""The table of the network: shares, what plan says, and what guesses bring, from results alone."""

from bench.evaluation.network import Measured, network_table
from knative.spec.cut import cut_evenly
from knative.spec.model_shape import shape_from_folder
from knative.spec.network_plan import Link, network_plan
from knative.spec.stage_plan import plan_stages
from tests.support.paths import ROOT

SHAPE = shape_from_folder(ROOT / "examples" / "llama-2-13b", "bfloat16")
PLANS = plan_stages(SHAPE, cut_evenly(SHAPE, 3))
STEPS = (0.01, 0.012, 0.01)


def measured(delay: float, at_once: int, guesses: int, factor: float = 1.0) -> Measured:
    plan = network_plan(PLANS, STEPS, at_once, 8, Link(delay, None))
    return Measured(
        delay_seconds=delay,
        bytes_per_second=None,
        guesses=guesses,
        at_once=at_once,
        tokens_per_second=factor * plan.tokens_per_second,
        step_seconds=STEPS,
    )


def test_what_went_as_planned_has_no_error_and_what_did_not_is_the_worst() -> None:
    results = [measured(delay, at_once, 0) for delay in (0.0, 0.005) for at_once in (1, 16)]
    table, verdict = network_table(PLANS, [*results, measured(0.005, 1, 16, 2.0)])
    assert "| 5 ms | any | 1 | 16.1 | 0.52 | 16.1 | +0% | 32.3 | 2.00 |" in table
    assert "off by at most 0%" in verdict
    _, verdict = network_table(PLANS, [*results[:2], measured(0.005, 1, 0, 0.8)])
    assert "off by at most 25%" in verdict
