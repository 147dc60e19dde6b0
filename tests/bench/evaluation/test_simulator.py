"""The simulator: it decides by the project's own code, agrees with counting by hand, and loses nothing when pods die."""

import json
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from bench.evaluation import fleet
from bench.evaluation.clock import Clock
from bench.evaluation.experiments import setting_smollm2
from bench.evaluation.fleet import Pod, StageKind
from bench.evaluation.gateway import Hops, SimulatedGateway
from bench.evaluation.opponents import clairvoyant, spread
from bench.evaluation.outcome import Outcome
from bench.evaluation.profile import DoesNotFit
from bench.evaluation.setting import KPA, MODELS, REPLICAS, STATIC, OverBudget, Setting
from bench.evaluation.simulator import Overheads, Simulation, World
from bench.evaluation.trace import Sizes, Trace, drawn
from eventing.wire.events import Batch, Row
from functions.configuration.pass_times import PassTimes
from functions.gateway.scheduling import scheduler, state
from functions.gateway.stages.failures import StageFailed
from functions.stage.engine import event_queue, sequences
from knative.local.autoscaler import kpa, revision_autoscaler
from knative.local.autoscaler.revision_settings import revision_settings
from knative.local.platform import FROM_ZERO
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import stage_service
from knative.spec.cut import cut_evenly


def setting(model: str = "llama-2-13b", device: str = "l40s", stages: int = 4, devices: int = 8) -> Setting:
    config = json.loads(MODELS[model].read_text())
    return Setting(model=model, config=config, device_name=device, stages=stages, devices=devices)


def steady(requests_per_second: float, seconds: int, seed: int = 1) -> Trace:
    return drawn("steady", np.full(seconds, requests_per_second), 1.0, seed, Sizes(most_answer_tokens=64))


def simulated(way: str, trace: Trace, given: Setting | None = None, world: World | None = None) -> tuple[Outcome, int]:
    return Simulation(given or setting(), way, trace, world or World()).run()


def test_decisions_are_the_products_own_code() -> None:
    assert issubclass(SimulatedGateway, scheduler.Scheduler)
    replaced = {name for name in vars(SimulatedGateway) if name in vars(scheduler.Scheduler) and not name.startswith("__")}
    assert replaced == {"_start", "_tick"}, "threads are replaced, decisions are not"
    assert fleet.EventQueue is event_queue.EventQueue
    assert fleet.SequenceTable is sequences.SequenceTable
    assert fleet.revision_autoscaler is revision_autoscaler.revision_autoscaler
    assert setting().cut(KPA) == cut_evenly(setting().shape, 4)


def test_another_autoscaler_decision_changes_the_number_of_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = steady(6.0, 20)
    _, before = simulated(KPA, trace)
    real = kpa.scale

    def timid(*arguments: Any) -> object:
        decision, state = real(*arguments)
        return replace(decision, desired_scale=min(1, decision.desired_scale)), state

    monkeypatch.setattr(kpa, "scale", timid)
    _, after = simulated(KPA, trace)
    assert before > 4 == after


def test_another_admission_rule_changes_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = steady(3.0, 20)
    before, _ = simulated(STATIC, trace)
    monkeypatch.setattr(state, "micro_batches_allowed", lambda *_: 1)
    after, _ = simulated(STATIC, trace)
    assert after.first_token_seconds[1] > 2 * before.first_token_seconds[1]


def test_one_conversation_takes_the_time_of_its_passes_and_hops() -> None:
    trace = Trace("one", np.zeros(1), np.array([200]), np.array([101]))
    world = World(overheads=Overheads(pass_seconds=0.002, hops=Hops(0.005, 1e-5)))
    real_clock = time.monotonic
    outcome, pods = simulated(STATIC, trace, world=world)
    assert time.monotonic is real_clock
    stages = setting().pass_times(STATIC)
    step = sum(each.forward_seconds(1, 250, 250) + each.logits_seconds(1) + 0.007 for each in stages) + 3e-5
    prompt = sum(each.forward_seconds(200, 20_100, 200) + 0.007 for each in stages) + 3 * 200e-5 + stages[3].logits_seconds(1)
    assert outcome.token_seconds[0] == pytest.approx(step, rel=0.01)
    reservations = 4 * 0.005  # in order, since no pod has said its lineage yet
    assert outcome.first_token_seconds[0] == pytest.approx(prompt + reservations, rel=0.01)
    assert pods == 8


def test_the_cost_counts_all_pods_and_a_run_repeats() -> None:
    trace = steady(2.0, 30)
    outcome, pods = simulated(STATIC, trace)
    assert (outcome.requests, outcome.failed, pods) == (len(trace), 0, 8)
    assert outcome.cost.replica_seconds == pytest.approx(8 * outcome.seconds)
    assert outcome.cost.cold_starts == 0
    tokens = trace.within(4096).prompt_tokens.sum() + trace.answer_tokens.sum() - len(trace)  # the last one is not computed
    assert outcome.cost.network_bytes == tokens * 3 * 2 * 2 * 5120
    assert simulated(STATIC, trace)[0] == outcome


def test_stages_at_zero_start_together_for_the_request_that_wakes_them() -> None:
    trace = Trace("two", np.array([0.0, 180.0]), np.array([200, 200]), np.array([16, 16]))
    outcome, pods = simulated(KPA, trace)
    assert (outcome.failed, outcome.cost.cold_starts, pods) == (0, 4, 4)
    assert 3.0 < outcome.first_token_seconds[2] < 6.0, "1.2 s and 6.5 GB at 25 Gbit/s, by all stages at the same time"
    assert outcome.cost.replica_seconds < 0.8 * 4 * outcome.seconds


def test_a_pod_merges_waiting_events_and_answers_them_together() -> None:
    """One stage: while a pass runs three events come; the first three of them fit into the next pass."""
    clock = Clock()
    kind = StageKind(0, 1, PassTimes(fixed_seconds=1.0), 0.0, 1000, 0.0, 0.0)
    pod = Pod(clock, kind, "http://0-1", 1, ready=True)
    ends: list[tuple[str, float]] = []
    for name in "abcd":
        row = Row(name, 0, 0, 1, reserve_tokens=2)
        pod.forward(Batch((row,), memoryview(b"")), "gateway", lambda *_, name=name: ends.append((name, clock.now)))
    clock.run(10.0)
    assert ends == [("a", 1.0), ("b", 2.0), ("c", 2.0), ("d", 2.0)]
    assert (pod.passes, pod.busy_seconds) == (2, 2.0)


def test_a_pod_that_dies_answers_everything_with_a_failure() -> None:
    clock, kind = Clock(), StageKind(0, 1, PassTimes(fixed_seconds=1.0), 0.0, 1000, 0.0, 0.0)
    pod, failed, called = Pod(clock, kind, "http://0-1", 1, ready=True), list[object](), list[str]()
    batch = Batch((Row("a", 0, 0, 1, reserve_tokens=2),), memoryview(b""))
    pod.forward(batch, "gateway", lambda reply, _: failed.append(reply))
    pod.call(partial(called.append, "between passes"))
    pod.await_memory(2000, partial(called.append, "waits for memory"))
    clock.run(0.5)
    pod.crash()
    assert called == ["between passes", "waits for memory"]
    pod.forward(batch, "gateway", lambda reply, _: failed.append(reply))
    assert [each.cause for each in failed if isinstance(each, StageFailed)] == ["broken", "refused"]
    clock.run(10.0)
    assert (len(failed), pod.passes) == (2, 1)


@pytest.mark.parametrize(("timeout_seconds", "gone_after"), [(600, 30.0), (10, 10.0)])
def test_a_pod_that_leaves_is_drained_no_longer_than_its_timeout(timeout_seconds: int, gone_after: float) -> None:
    template = stage_service(ResolvedPipeline(setting().spec(KPA), setting().cut(KPA), "0" * 64), 0)["spec"]["template"]
    template["spec"]["timeoutSeconds"] = timeout_seconds
    clock, kind = Clock(), StageKind(0, 4, PassTimes(fixed_seconds=1.0), 0.0, 1000, 0.0, 0.0)
    plan = [2, 2, *[1] * 60]
    pods = fleet.Fleet(clock, kind, revision_settings(template, FROM_ZERO), template, lambda *_: None, plan)
    clock.run(2.5)
    assert [pod.leaving for pod in pods.pods.values()] == [False, True]
    clock.run(2.0 + gone_after - 0.1)
    assert len(pods.pods) == 2
    clock.run(2.0 + gone_after + 0.1)
    assert len(pods.pods) == 1


def test_prompts_of_all_routes_take_turns_at_a_stage_that_they_share() -> None:
    """Two routes part at the last stage. Prompts of one would else wait at the first until the other has none."""
    trace = Trace("prompts", np.linspace(0.0, 0.1, 24), np.full(24, 2000), np.full(24, 2))
    simulation = Simulation(setting(), STATIC, trace, World(), pods=(1, 1, 1, 2))
    simulation.run()
    overtaken = np.argsort(np.argsort(simulation.first_seconds)) - np.arange(24)
    assert np.abs(overtaken).max() <= 4


@pytest.mark.parametrize(("device", "tokens"), [("l40s", 496), ("h100-sxm", 394), ("cores", 256)])
def test_chunks_of_prompts_are_twice_as_long_as_a_pass_reads_its_weights(device: str, tokens: int) -> None:
    """An L40S computes 279 tokens meanwhile, and merges 512 with a decode step; an H100 197. On cores arithmetic is slower."""
    given = setting_smollm2() if device == "cores" else setting(device=device)
    assert given.chunk_tokens(STATIC) == tokens
    assert given.spec(STATIC).gateway.chunk_tokens == tokens


def test_memory_of_a_pod_bounds_what_runs_at_once() -> None:
    """A pod with memory for one of three sequences serves them one by one, whatever the micro-batches would hold."""
    trace = Trace("three", np.zeros(3), np.full(3, 3000), np.full(3, 100))
    tight = setting()
    object.__setattr__(tight, "kv_tokens", lambda way: 4096)
    object.__setattr__(tight, "devices", 4)
    roomy = setting(devices=4)
    (fast, _), (slow, _) = simulated(STATIC, trace, roomy), simulated(STATIC, trace, tight)
    assert slow.failed == 0
    assert slow.first_token_seconds[2] > fast.first_token_seconds[2] + 3


def test_micro_batches_that_move_take_their_keys_and_values_along() -> None:
    """At first there is a pod for each stage. Those that join get micro-batches: handed over, or computed again."""
    trace = steady(7.0, 30)
    moved = {}
    for rate in (0.0, 1e11):
        simulation = Simulation(setting(), KPA, trace, World(handover_bytes_per_second=rate))
        outcome, _ = simulation.run()
        (gateway,) = simulation.gateways
        assert outcome.failed == 0
        assert gateway.stats().migrations["balance"] > 0
        moved[rate] = gateway.tokens_sent
    tokens = 6 * int(trace.within(4096).prompt_tokens.sum() + trace.answer_tokens.sum() - len(trace))
    assert tokens <= moved[1e11] < moved[0.0]


def test_nothing_is_lost_when_pods_are_killed_and_one_is_slow() -> None:
    trace = steady(2.0, 30).within(1024)
    calm, _ = simulated(STATIC, trace)
    faulty = Simulation(setting(), STATIC, trace, World(kill_every_seconds=10.0, slow_pod=3.0))
    outcome, _ = faulty.run()
    assert outcome.failed == 0
    assert sum(pod.boot for each in faulty.fleets for pod in each.pods.values()) >= 3
    assert outcome.token_seconds[2] > calm.token_seconds[2]
    assert outcome.pauses is not None
    assert calm.pauses is not None
    assert outcome.pauses[1] > calm.pauses[1]


def test_gateways_share_the_pods() -> None:
    trace = steady(3.0, 20)
    simulation = Simulation(setting(), STATIC, trace, World(gateways=3))
    outcome, _ = simulation.run()
    assert outcome.failed == 0
    answered = [gateway.stats().sequences["length"] for gateway in simulation.gateways]
    assert sum(answered) == len(trace)
    assert max(answered) - min(answered) <= 1


def test_the_clairvoyant_has_pods_before_their_load_and_costs_less_than_a_full_pipeline() -> None:
    trace = drawn("late", np.repeat([0.0, 4.0, 0.0], [40, 20, 60]), 1.0, 1, Sizes(most_answer_tokens=64))
    seen, _ = clairvoyant(setting(), trace, World())
    scaling, _ = simulated(KPA, trace)
    assert seen.failed == 0
    assert seen.first_token_seconds[2] < 0.5 * scaling.first_token_seconds[2]
    assert seen.cost.replica_seconds < 0.8 * 8 * seen.seconds


def test_static_pods_are_spread_by_the_stages_work() -> None:
    assert spread([1.0, 1.0, 1.0, 1.5], 4) == (1, 1, 1, 1)
    assert spread([1.0, 1.0, 1.0, 1.5], 5) == (1, 1, 1, 2)
    assert spread([1.0, 1.0, 1.0, 1.5], 8) == (2, 2, 2, 2)
    outcome, pods = Simulation(setting(), STATIC, steady(1.0, 10), World(), pods=(1, 1, 1, 2)).run()
    assert pods == 5
    assert outcome.cost.replica_seconds == pytest.approx(5 * outcome.seconds)


def test_events_of_virtual_time_come_in_order() -> None:
    clock, seen = Clock(), list[str]()
    clock.after(2.0, partial(seen.append, "b"))
    clock.after(2.0, partial(seen.append, "c"))
    clock.after(1.0, lambda: clock.after(0.5, partial(seen.append, "a")))
    clock.run(1.9)
    assert (seen, clock.now) == (["a"], 1.9)
    clock.run(2.0)
    assert seen == ["a", "b", "c"]


def test_a_stage_that_does_not_fit_is_reported() -> None:
    with pytest.raises(DoesNotFit, match=r"replicas, KPA, stage 0 of llama-2-70b on l40s: 1[34].* GB of weights"):
        simulated(REPLICAS, steady(1.0, 10), setting("llama-2-70b"))
    with pytest.raises(OverBudget, match="3 devices for 4 stages"):
        setting(devices=3)
