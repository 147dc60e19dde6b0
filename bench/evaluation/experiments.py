"""The experiments: each is a list of runs, with their settings and repetitions."""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Final

import msgspec

from bench.evaluation.emulated import EmulatedRun
from bench.evaluation.network import NETWORKS, REMEDIES, Lengths
from bench.evaluation.opponents import clairvoyant, static
from bench.evaluation.outcome import Outcome
from bench.evaluation.profile import read_profile
from bench.evaluation.results import Result, RunKey
from bench.evaluation.setting import KPA, MODELS, OBJECTIVE, REPLICAS, SMOLLM2_PROFILE, STATIC, WAYS, Setting
from bench.evaluation.simulator import Overheads, Simulation, World
from bench.evaluation.trace import LOADS, Bursts, Trace, make_loads, read_trace
from knative.local.proxies.network import EmulatedNetwork
from storage.store.object_store import ObjectStore

NAMES: Final = ("emulated", "calibration", "simulated", "opponents", "faults", "measured", "network")
CLAIRVOYANT: Final = "clairvoyant pipeline"
_STATIC_PODS: Final = (4, 5, 6, 7, 8)
_KILL_EVERY_SECONDS: Final = 20.0
_SLOW_POD: Final = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The sizes of all experiments."""

    emulated_loads: Sequence[str] = ("bursts", "trace")
    emulated_ways: Sequence[str] = (REPLICAS, STATIC, KPA, OBJECTIVE)
    emulated_seconds: int = 240  # long enough that stages scale in
    bursts: Bursts = field(default_factory=Bursts)
    tail_seconds: float = 40.0  # after a load's last arrival, for answers that still run
    answer_tokens: int = 288  # upper bound, so that answers end within the tail
    peak: float = 4.0  # requests a second
    slowness: float = 1.0  # of the emulated devices, beside the published ones; peak and answers are divided by it
    runs: int = 4  # the same seeds for all ways
    simulated_seconds: int = 600
    simulated_runs: int = 4
    simulated_loads: Sequence[str] = LOADS
    measured_loads: Sequence[str] = ("bursts",)
    measured_runs: int = 5
    networks: Mapping[EmulatedNetwork, Sequence[str]] = field(  # network → remedies that are measured in it
        default_factory=lambda: dict.fromkeys(NETWORKS, tuple(REMEDIES))
    )
    network_lengths: Lengths = field(default_factory=Lengths)
    trace: Path | None = None


QUICK: Final = Plan(
    emulated_loads=("bursts",),
    emulated_seconds=10,
    tail_seconds=8.0,
    answer_tokens=64,
    runs=1,
    simulated_seconds=120,
    simulated_runs=2,
    measured_runs=1,
    networks={EmulatedNetwork(): (), EmulatedNetwork(0.005): tuple(REMEDIES)},
    network_lengths=Lengths(4, 8),
)


@dataclass(frozen=True, slots=True)
class Run:
    key: RunKey
    action: Callable[[], Result]  # called if the result is not on disk yet


def setting_13b(stages: int = 4, devices: int = 8, device: str = "l40s", slowness: float = 1.0) -> Setting:
    """slowness: factor of the seconds of passes. Passes of slow devices take long beside what this machine adds to them."""
    setting = Setting(model="llama-2-13b", config=_config("llama-2-13b"), device_name=device, stages=stages, devices=devices)
    if slowness == 1.0:
        return setting
    return replace(
        setting, measured=setting.profile.times(slowness), memory_bytes=setting.device.memory_bytes, slowness=slowness
    )


def setting_smollm2() -> Setting:
    """As many cores as 13B has GPUs, each with the memory of a small pod, with a profile measured on one core."""
    name = "smollm2-135m-instruct"
    measured = read_profile(SMOLLM2_PROFILE)
    return Setting(
        model=name, config=_config(name), device_name="cores", stages=4, devices=8, measured=measured, memory_bytes=2e9
    )


def _config(model: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(MODELS[model].read_text(encoding="utf-8"))
    return found


def emulated(plan: Plan, store: Callable[[], ObjectStore], folder: Path) -> Iterator[Run]:
    """Ways on the real system with emulated devices."""
    setting = setting_13b(slowness=plan.slowness)
    for key, load in _emulated_loads("emulated", plan, setting):
        yield Run(key, _emulate(key, setting, load, store, folder))


def calibration(plan: Plan, overheads: Overheads) -> Iterator[Run]:
    """The same runs, simulated. overheads: the measured costs of an emulated run beyond its profile."""
    setting = setting_13b(slowness=plan.slowness)
    for emulated_key, load in _emulated_loads("calibration", plan, setting):
        hops = overheads.hops
        costs = (overheads.pass_seconds, hops.hop_seconds, hops.hop_token_seconds)
        key = msgspec.structs.replace(emulated_key, overheads=costs)
        world = World(overheads=overheads, tail_seconds=key.tail_seconds)
        yield Run(key, _simulate(key, setting, load, world))


def simulated(plan: Plan) -> Iterator[Run]:
    """All ways under all loads, simulated, for longer."""
    return _ways("simulated", plan, setting_13b(), plan.simulated_loads, WAYS, plan.simulated_runs)


def measured(plan: Plan) -> Iterator[Run]:
    """The same for a model whose passes were measured, not computed from published figures."""
    return _ways("measured", plan, setting_smollm2(), plan.measured_loads, WAYS, plan.measured_runs)


def _ways(experiment: str, plan: Plan, setting: Setting, loads: Sequence[str], ways: Sequence[str], runs: int) -> Iterator[Run]:
    for key, load in _loads(experiment, plan, setting, loads, ways, runs, plan.simulated_seconds):
        yield Run(key, _simulate(key, setting, load, World(tail_seconds=key.tail_seconds)))


def opponents(plan: Plan) -> Iterator[Run]:
    """Pipelines that scale, static pipelines of 4 to 8 pods, and one that knows the arrivals, simulated."""
    setting = setting_13b()
    ways = {f"static, {pods} pods": partial(static, pods=pods) for pods in _STATIC_PODS} | {CLAIRVOYANT: clairvoyant}
    yield from _ways("opponents", plan, setting, plan.simulated_loads, (KPA, OBJECTIVE), plan.simulated_runs)
    keys = _loads("opponents", plan, setting, plan.simulated_loads, tuple(ways), plan.simulated_runs, plan.simulated_seconds)
    for key, load in keys:
        yield Run(key, _timed(key, partial(ways[key.way], setting, load, World(tail_seconds=key.tail_seconds))))


def faults(plan: Plan) -> Iterator[Run]:
    """Bursts while pods are killed and one is slow, beside the same without faults, simulated."""
    setting = setting_13b()
    for name, kills, slow in (
        ("bursts", 0.0, 1.0),
        ("bursts, a pod slow", 0.0, _SLOW_POD),
        ("bursts, pods killed", _KILL_EVERY_SECONDS, 1.0),
        ("bursts, both", _KILL_EVERY_SECONDS, _SLOW_POD),
    ):
        ways = (STATIC, KPA, OBJECTIVE)
        for key, load in _loads("faults", plan, setting, ("bursts",), ways, plan.simulated_runs, plan.simulated_seconds):
            world = World(tail_seconds=key.tail_seconds, kill_every_seconds=kills, slow_pod=slow, seed=key.seed)
            named = msgspec.structs.replace(key, load=name)
            yield Run(named, _simulate(named, setting, load, world))


def _emulated_loads(experiment: str, plan: Plan, setting: Setting) -> Iterator[tuple[RunKey, Trace]]:
    plan = replace(plan, peak=plan.peak / plan.slowness, answer_tokens=round(plan.answer_tokens / plan.slowness))
    return _loads(experiment, plan, setting, plan.emulated_loads, plan.emulated_ways, plan.runs, plan.emulated_seconds)


def _loads(
    experiment: str, plan: Plan, setting: Setting, loads: Sequence[str], ways: Sequence[str], runs: int, seconds: int
) -> Iterator[tuple[RunKey, Trace]]:
    """Each run's key and load. Raises TraceInvalid."""
    trace = _trace(plan)
    for load, way, seed in product(loads, ways, range(runs)):
        key = _key(experiment, plan, setting, load, way, seed, seconds, plan.peak)
        yield key, make_loads(seconds, key.peak, seed, trace, plan.bursts)[load].with_answers_within(key.answer_tokens)


def _key(experiment: str, plan: Plan, setting: Setting, load: str, way: str, seed: int, seconds: int, peak: float) -> RunKey:
    described = f"{setting.model} on {setting.devices} {setting.device_name}, {setting.stages} stages"
    digest = None if plan.trace is None else hashlib.sha256(plan.trace.read_bytes()).hexdigest()[:16]
    return RunKey(
        experiment=experiment,
        load=load,
        way=way,
        seed=seed,
        seconds=seconds,
        peak=peak,
        bursts=(plan.bursts.seconds, plan.bursts.pause_seconds),
        setting=described,
        tail_seconds=plan.tail_seconds,
        answer_tokens=plan.answer_tokens,
        trace=digest,
        profile=None if setting.measured is None else hashlib.sha256(msgspec.json.encode(setting.measured)).hexdigest()[:16],
    )


def _trace(plan: Plan) -> Trace | None:
    """Raises TraceInvalid."""
    return None if plan.trace is None else read_trace(plan.trace)


def _emulate(
    key: RunKey, setting: Setting, load: Trace, store: Callable[[], ObjectStore], folder: Path
) -> Callable[[], Result]:
    def run() -> Result:
        began = time.monotonic()
        logs = folder / key.file_name.removesuffix(".yaml")
        outcome = asyncio.run(EmulatedRun(setting, key.way, load, store(), logs, key.tail_seconds).run())
        return Result(key, outcome, None, os.getloadavg()[0], time.monotonic() - began)

    return run


def _simulate(key: RunKey, setting: Setting, load: Trace, world: World) -> Callable[[], Result]:
    return _timed(key, lambda: Simulation(setting, key.way, load, world).run())


def _timed(key: RunKey, simulate: Callable[[], tuple[Outcome, int]]) -> Callable[[], Result]:
    def run() -> Result:
        began = time.process_time()
        outcome, pods = simulate()
        return Result(key, outcome, pods, None, time.process_time() - began)

    return run
