"""The simulator: it decides by the project's own code, agrees with counting by hand, and is fast."""

import ast
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.evaluation import fleet, rounds, simulator
from bench.evaluation.outcome import Outcome
from bench.evaluation.profile import DoesNotFit
from bench.evaluation.rounds import Overheads, Work, flow
from bench.evaluation.setting import MODELS, WAYS, OverBudget, Setting
from bench.evaluation.simulator import Simulation, World
from bench.evaluation.trace import Sizes, Trace, drawn
from functions.configuration.pass_times import PassTimes
from functions.gateway.scheduling import batching, scheduler, state
from functions.gateway.stages import routes
from functions.gateway.stages.routes import Endpoint
from functions.stage.engine import event_queue
from knative.local.autoscaler import hpa, kpa, revision_autoscaler
from knative.spec.cut import cut_evenly
from tests.support.paths import ROOT

COPY, REPLICAS, STATIC, HPA, KPA = WAYS


def setting(model: str = "llama-2-13b", device: str = "l40s", stages: int = 4, devices: int = 8) -> Setting:
    config = json.loads(MODELS[model].read_text())
    return Setting(model=model, config=config, device_name=device, stages=stages, devices=devices)


def steady(requests_per_second: float, seconds: int, seed: int = 1) -> Trace:
    return drawn("steady", np.full(seconds, requests_per_second), 1.0, seed, Sizes(most_answer_tokens=256))


def simulated(way: str, trace: Trace, given: Setting | None = None, world: World | None = None) -> tuple[Outcome, int]:
    return Simulation(given or setting(), way, trace, world or World()).run()


def test_decisions_are_the_products_own_code() -> None:
    assert fleet.RevisionAutoscaler is revision_autoscaler.RevisionAutoscaler
    assert fleet.HorizontalPodAutoscaler is hpa.HorizontalPodAutoscaler
    assert setting().cut(KPA) == cut_evenly(setting().shape, 4)
    theirs = {"RevisionAutoscaler", "HorizontalPodAutoscaler", "scale", "recommend", "cut_evenly"}
    for name, users, module in (
        ("micro_batches_allowed", (simulator, state), batching),
        ("micro_batches_wanted", (simulator, state), batching),
        ("admissible_sequences", (simulator, scheduler), batching),
        ("max_waiting", (simulator, scheduler), batching),
        ("uneven", (simulator,), routes),
        ("most_merged", (rounds,), event_queue),
    ):
        assert {getattr(user, name) for user in users} == {getattr(module, name)}
        theirs.add(name)
    for path in (ROOT / "bench" / "evaluation").glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert not own & theirs, f"{path.name} has {own & theirs} of its own"


def test_another_autoscaler_decision_changes_the_number_of_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = steady(3.0, 60)
    _, before = simulated(KPA, trace)
    real = kpa.scale

    def timid(*arguments: Any) -> object:
        decision, state = real(*arguments)
        return replace(decision, desired_scale=min(1, decision.desired_scale)), state

    monkeypatch.setattr(kpa, "scale", timid)
    _, after = simulated(KPA, trace)
    assert before > 4 == after


def test_another_admission_rule_changes_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = steady(3.0, 60)
    before, _ = simulated(STATIC, trace)
    monkeypatch.setattr(simulator, "micro_batches_allowed", lambda *_: 1)
    after, _ = simulated(STATIC, trace)
    assert after.first_token_seconds[1] > 2 * before.first_token_seconds[1]


def test_other_bounds_of_admission_and_queue_change_latency_and_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = steady(3.0, 60)
    before, _ = simulated(STATIC, trace)
    monkeypatch.setattr(simulator, "admissible_sequences", lambda running, *_: 1 - running)
    alone, _ = simulated(STATIC, trace)
    assert alone.first_token_seconds[1] > 2 * before.first_token_seconds[1]
    monkeypatch.undo()
    monkeypatch.setattr(simulator, "max_waiting", lambda *_: 1)
    refusing, _ = simulated(STATIC, trace)
    assert refusing.failed > before.failed == 0


def test_without_migrations_nothing_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = steady(3.0, 60)
    moving, _ = simulated(KPA, trace)
    monkeypatch.setattr(simulator, "uneven", lambda *_: False)
    staying, _ = simulated(KPA, trace)
    tokens = trace.within(4096).prompt_tokens.sum() + trace.answer_tokens.sum()
    assert staying.cost.network_bytes == tokens * 3 * 2 * 2 * 5120 < moving.cost.network_bytes


@pytest.mark.parametrize(
    ("micro_batches", "before", "now"), [(1, 1, 8), (8, 4, 8), (7, 4, 5), (13, 1, 3), (20, 3, 4), (8, 4, 2), (3, 3, 1)]
)
def test_as_many_micro_batches_migrate_as_in_the_gateway(micro_batches: int, before: int, now: int) -> None:
    placed = routes.Placement(["http://stage-0"], watched=True)
    placed.update(0, [Endpoint(f"pod-{pod}") for pod in range(before)])
    there = [route for _ in range(micro_batches) if (route := placed.place(1)) is not None]
    placed.update(0, [Endpoint(f"pod-{pod}", terminating=pod >= now) for pod in range(max(before, now))])
    moves = 0
    for route in there:
        if (target := placed.must_leave(route)) is not None:
            route.replace(target)
            moves += 1
    while (found := placed.unbalanced()) is not None:
        next(route for route in there if found[0] in route.instances).replace(found[1])
        moves += 1
    assert simulator.moves_of(micro_batches, before, now) == moves


def test_one_conversation_takes_the_time_of_its_passes_and_hops() -> None:
    trace = Trace("one", np.zeros(1), np.array([200]), np.array([101]))
    world = World(overheads=Overheads(pass_seconds=0.002, hop_seconds=0.005), step_seconds=0.02)
    outcome, pods = simulated(STATIC, trace, world=world)
    stages = setting().pass_times(STATIC)
    step = sum(each.forward_seconds(1, 250, 250) + each.logits_seconds(1) + 0.007 for each in stages)
    prompt = sum(each.forward_seconds(200, 20_100, 200) + each.logits_seconds(1) + 0.007 for each in stages)
    assert outcome.token_seconds[0] == pytest.approx(step, rel=0.03)
    assert prompt < outcome.first_token_seconds[0] < prompt * 1.5 + 0.04
    assert pods == 8


def test_every_request_is_answered_and_the_cost_counts_all_pods() -> None:
    trace = steady(2.0, 120)
    outcome, pods = simulated(STATIC, trace)
    assert (outcome.requests, outcome.failed, pods) == (len(trace), 0, 8)
    assert outcome.cost.replica_seconds == pytest.approx(8 * outcome.seconds)
    assert outcome.cost.cold_starts == 0
    tokens = trace.within(4096).prompt_tokens.sum() + trace.answer_tokens.sum()
    assert outcome.cost.network_bytes == tokens * 3 * 2 * 2 * 5120
    kpa_outcome, _ = simulated(KPA, steady(0.3, 120))
    assert kpa_outcome.failed == 0
    assert kpa_outcome.cost.cold_starts >= 4
    assert kpa_outcome.cost.replica_seconds < 0.8 * 8 * kpa_outcome.seconds
    assert kpa_outcome.first_token_seconds[2] > 2.5, "nobody waited for pods that start from zero"


def test_one_copy_is_slower_than_eight_devices() -> None:
    trace = steady(4.0, 90)
    alone, _ = simulated(COPY, trace)
    many, pods = simulated(REPLICAS, trace)
    assert pods > 3
    assert many.tokens_per_second > 1.5 * alone.tokens_per_second
    assert many.attainment > alone.attainment


def test_events_that_wait_for_the_same_pod_are_merged() -> None:
    """One stage: of two micro-batches and a chunk one is computed alone, the others in one pass, which takes as long."""
    times, hops = PassTimes(fixed_seconds=1.0), Overheads(hop_seconds=0.0)
    work = Work(decoding=2, micro_batches=2, held_tokens=0, prompt_tokens=256, chunk_tokens=256)
    one = flow([times], [1], work, hops)
    assert one.round_seconds == pytest.approx(2.0)
    assert one.prompt_tokens_per_second == pytest.approx(256 / 2.0)


def test_the_first_token_before_a_lull_does_not_wait_for_its_end() -> None:
    trace = Trace("two", np.array([1.0, 21.0]), np.array([200, 200]), np.array([2, 2]))
    outcome, _ = simulated(STATIC, trace)
    assert outcome.first_token_seconds[2] < 1


def test_memory_bounds_admission() -> None:
    """A pod with room for the longest sequence alone serves them one by one, whatever the micro-batches would hold."""
    trace = Trace("three", np.zeros(3), np.full(3, 3000), np.full(3, 100))
    roomy = setting()
    tight = setting()
    object.__setattr__(tight, "kv_tokens", lambda way: 2000)
    (fast, _), (slow, _) = simulated(STATIC, trace, roomy), simulated(STATIC, trace, tight)
    assert slow.first_token_seconds[2] > fast.first_token_seconds[2] + 3


def test_a_round_takes_the_unhindered_time_or_the_narrowest_stages() -> None:
    times = [PassTimes(fixed_seconds=seconds) for seconds in (0.03, 0.09, 0.03)]

    def work(micro_batches: int) -> Work:
        return Work(micro_batches, micro_batches, 0.0, 0.0, 256)

    none = Overheads(hop_seconds=0.0)
    assert flow(times, [1, 1, 1], work(1), none).round_seconds == pytest.approx(0.15)
    assert flow(times, [1, 1, 1], work(4), none).round_seconds == pytest.approx(0.36)
    assert flow(times, [1, 3, 1], work(4), none).round_seconds == pytest.approx(0.15)
    busy = flow(times, [1, 1, 1], work(4), none)
    assert busy.in_flight == pytest.approx((4 / 12, 4 * 10 / 12, 4 / 12), rel=0.01)
    assert busy.busy_share[1] == pytest.approx(1.0)


def test_equal_stages_are_simulated_once() -> None:
    inner, last = PassTimes(fixed_seconds=0.03), PassTimes(fixed_seconds=0.05, token_seconds=0.001)
    work = Work(9, 9, 100.0, 500.0, 256)
    once = flow([inner, last], [2, 3], work, Overheads(), [3, 1])
    each = flow([inner, inner, inner, last], [2, 2, 2, 3], work, Overheads())
    assert once.round_seconds == pytest.approx(each.round_seconds)
    assert once.fill_seconds == pytest.approx(each.fill_seconds)
    assert once.prompt_tokens_per_second == pytest.approx(each.prompt_tokens_per_second)
    assert once.in_flight == pytest.approx((each.in_flight[0], each.in_flight[3]))


def test_a_thousand_pods_are_simulated_a_thousand_times_faster_than_they_live() -> None:
    given = setting(devices=1024)
    trace = steady(450.0, 900)
    simulation = Simulation(given, KPA, trace, World(step_seconds=0.5))
    began = time.process_time()
    outcome, pods = simulation.run()
    assert pods >= 1000
    assert outcome.seconds / (time.process_time() - began) > 1000


def test_a_stage_that_does_not_fit_is_reported() -> None:
    with pytest.raises(DoesNotFit, match=r"replicas, KPA, stage 0 of llama-2-70b on l40s: 1[34].* GB of weights"):
        simulated(REPLICAS, steady(1.0, 10), setting("llama-2-70b"))
    with pytest.raises(OverBudget, match="3 devices for 4 stages"):
        setting(devices=3)
    assert Path(MODELS["llama-2-70b"]).exists()
