"""Every alert fires when it should, and none on an ordinary day: rules evaluated over pages of the functions' exporters."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from eventing.problems import PROBLEMS
from functions.gateway.answers.metrics import GatewayMetrics
from functions.gateway.fleet.overview import FleetCollector, MemberState, fleet_metrics
from functions.gateway.scheduling.metrics import SchedulerCollector
from functions.gateway.scheduling.stats import StageStats, Stats
from functions.stage.serving.app import StageMetrics
from knative.render import monitoring
from knative.render.monitoring import ALERTS, rule_groups
from tests.support.functions.metrics import member_state
from tests.support.knative.promql import Recorded

if TYPE_CHECKING:
    from functions.stage.engine.engine import Engine

SCRAPE_SECONDS = 30
MINUTE = 60

ENGINE = SimpleNamespace(
    cache=SimpleNamespace(free_tokens=4096, cached_tokens=0, blocks=None),
    kv=SimpleNamespace(resident_bytes=0),
    sequences=SimpleNamespace(by_id={"one": None}),
    adapters=SimpleNamespace(loaded=0, loaded_bytes=0),
)


@dataclass
class Gateway:
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
    stats: Stats = field(default_factory=lambda: Stats([StageStats()]))

    refused: int = 0
    members: tuple[MemberState, ...] = ()  # of the gateway of a fleet

    def __post_init__(self) -> None:
        self.metrics.refused_addresses.labels("0:6").set_function(lambda: self.refused)
        self.metrics.registry.register(SchedulerCollector(lambda: self.stats, ["0:6"]))
        self.metrics.queue_limit.set(256)
        self.metrics.ready.set(1)

    def page(self) -> str:
        registry = self.metrics.registry
        if self.members:
            registry = CollectorRegistry()
            registry.register(FleetCollector(self.metrics.registry, tuple, lambda: fleet_metrics({}, 0, self.members)))
        return generate_latest(registry).decode()

    def answer(self, outcome: str = "stop", count: int = 1, first_token_seconds: float = 0.2) -> None:
        self.metrics.answers.labels(outcome).inc(count)
        self.stats.tokens += 20 * count
        for _ in range(count):
            self.metrics.first_token.observe(first_token_seconds)


@dataclass
class Pipeline:
    """A gateway and a stage of two pods. A story changes what it needs."""

    gateway: Gateway = field(default_factory=Gateway)
    gateway_pod: str | None = "gateway-1"
    stages: dict[str, StageMetrics] = field(default_factory=dict)

    def pod(self, name: str, ready: bool = True) -> StageMetrics:
        if name not in self.stages:
            self.stages[name] = StageMetrics()
            self.stages[name].watch(cast("Engine", ENGINE))
        self.stages[name].ready.set(ready)
        return self.stages[name]

    def forwarded(self, status: str = "200", count: int = 1) -> None:
        for stage in self.stages.values():
            stage.events.labels("dev.lamina.forward", status).inc(count)


Story = Callable[[Pipeline, int], None]  # what happens in the half minute before a scrape; the number of the minute


def fired(story: Story, minutes: int = 40) -> set[str]:
    """Names of alerts that fired at any time: their expression held at every evaluation for as long as the rule says."""
    pipeline, recorded = Pipeline(), Recorded(SCRAPE_SECONDS)
    rules = rule_groups('namespace="models",pipeline="chat"')[0]["rules"]
    pending: dict[tuple[str, object], float] = {}
    firing: set[str] = set()
    common = {"namespace": "models", "pipeline": "chat"}
    for now in range(0, minutes * MINUTE, SCRAPE_SECONDS):
        story(pipeline, now // MINUTE)
        if pipeline.gateway_pod is not None:
            recorded.scrape(pipeline.gateway.page(), now, **common, service="chat", pod=pipeline.gateway_pod)
        for pod, stage in pipeline.stages.items():
            recorded.scrape(generate_latest(stage.registry).decode(), now, **common, service="chat-s0", pod=pod)
        if now % MINUTE:
            continue
        for rule in rules:
            name, wait = rule["alert"], int(rule["for"].removesuffix("m")) * MINUTE
            seen = {(name, labels) for labels in recorded.at(rule["expr"], now)}
            for key in seen:
                if now - pending.setdefault(key, now) >= wait:
                    firing.add(name)
            for key in [key for key in pending if key[0] == name and key not in seen]:
                del pending[key]
    return firing


def well(pipeline: Pipeline) -> None:
    """Half a minute without trouble."""
    pipeline.pod("s0-1").tokens.inc(100)
    pipeline.pod("s0-2")
    pipeline.forwarded(count=40)
    pipeline.gateway.answer(count=4)
    pipeline.gateway.stats.waiting, pipeline.gateway.stats.running = 2, 8


def ordinary(pipeline: Pipeline, minute: int) -> None:
    """Including a long queue or wait for a device for a while, a restart, single failures, clients' mistakes and a slow cold
    start."""
    well(pipeline)
    pipeline.gateway.members = (member_state("tiny", 1, 60.0 * minute, 150.0 if minute == 30 else None),)
    stats = pipeline.gateway.stats
    stats.waiting = 200 if 5 <= minute < 10 else 2
    stats.memory_backlog = 3 if 5 <= minute < 12 else 0
    pipeline.gateway.answer("invalid-request", 3)
    pipeline.gateway.answer("cancelled")
    if minute in (15, 25):
        pipeline.gateway.answer("deadline-exceeded")
        stats.replays["broken"] += 1
        pipeline.forwarded("500") if minute == 15 else None
    if minute == 20:
        pipeline.stages.pop("s0-2", None)
    pipeline.gateway.answer(first_token_seconds=25.0)


def asleep(pipeline: Pipeline, minute: int) -> None:
    """No requests; the stage is at zero."""


def slow_start(pipeline: Pipeline, minute: int) -> None:
    """Weights load for four minutes, and requests wait."""
    pipeline.pod("s0-1", ready=minute >= 4)
    if minute >= 4:
        well(pipeline)
    else:
        pipeline.gateway.stats.waiting = 3


def stuck(pipeline: Pipeline, minute: int) -> None:
    if minute < 5:
        well(pipeline)
    pipeline.gateway.stats.waiting, pipeline.gateway.stats.running = 3, 0


def first_failures_ever(pipeline: Pipeline, minute: int) -> None:
    """All of a few answers fail, after none ever has."""
    if minute < 8:
        return
    pipeline.gateway.answer("pipeline-unavailable")


def late_first_tokens(pipeline: Pipeline, minute: int) -> None:
    well(pipeline)
    pipeline.gateway.answer(first_token_seconds=31.0)


def long_queue(pipeline: Pipeline, minute: int) -> None:
    well(pipeline)
    pipeline.gateway.stats.waiting = 65


def long_queue_of_a_short_limit(pipeline: Pipeline, minute: int) -> None:
    """The queue of 32 is nearly full."""
    well(pipeline)
    pipeline.gateway.metrics.queue_limit.set(32)
    pipeline.gateway.stats.waiting = 30


def replays(pipeline: Pipeline, minute: int) -> None:
    well(pipeline)
    pipeline.gateway.stats.replays["broken"] += 3


def replays_and_nothing_else(pipeline: Pipeline, minute: int) -> None:
    if minute >= 5:
        pipeline.gateway.stats.replays["timeout"] += 1


def failing_stage(pipeline: Pipeline, minute: int) -> None:
    """One conversation a minute, and all fail."""
    pipeline.pod("s0-1")
    if minute >= 5:
        for type_ in ("reserve", "release"):
            pipeline.stages["s0-1"].events.labels(f"dev.lamina.{type_}", "200").inc(0.25)
        pipeline.stages["s0-1"].events.labels("dev.lamina.forward", "500").inc(0.25)


def full_memory(pipeline: Pipeline, minute: int) -> None:
    """Every request needs more memory than is free."""
    well(pipeline)
    pipeline.gateway.stats.memory_backlog = 2


def kept_devices(pipeline: Pipeline, minute: int) -> None:
    """One model of a fleet waits for a device that another keeps."""
    well(pipeline)
    pipeline.gateway.members = (member_state("waits", 0, 0.0, 60.0 * minute), member_state("served", 1, 60.0 * minute))


def foreign_network(pipeline: Pipeline, minute: int) -> None:
    well(pipeline)
    pipeline.gateway.refused = 1


def never_ready(pipeline: Pipeline, minute: int) -> None:
    """Knative removes each pod after ten minutes and starts another."""
    pipeline.stages.clear()
    if minute % 11 < 10:
        pipeline.pod(f"s0-{minute // 11}", ready=False)


def gateway_never_ready(pipeline: Pipeline, minute: int) -> None:
    """Each gateway is replaced after two minutes."""
    pipeline.gateway.metrics.ready.set(0)
    pipeline.gateway_pod = None if minute % 3 == 2 else f"gateway-{minute // 3}"


def crash_loop(pipeline: Pipeline, minute: int) -> None:
    """One pod works; the container of the other restarts again and again."""
    well(pipeline)
    pipeline.stages.pop("s0-2", None)
    if minute % 3 == 0:
        pipeline.pod("s0-2", ready=False)


FIRES: list[tuple[str, Story]] = [
    ("LaminaStuck", stuck),
    ("LaminaAnswersFail", first_failures_ever),
    ("LaminaFirstTokenSlow", late_first_tokens),
    ("LaminaQueueLong", long_queue),
    ("LaminaQueueLong", long_queue_of_a_short_limit),
    ("LaminaReplays", replays),
    ("LaminaReplays", replays_and_nothing_else),
    ("LaminaStageFails", failing_stage),
    ("LaminaStageMemoryFull", full_memory),
    ("LaminaFleetDeviceWait", kept_devices),
    ("LaminaPodNetworkWrong", foreign_network),
    ("LaminaNotReady", never_ready),
    ("LaminaNotReady", gateway_never_ready),
    ("LaminaPodNotReady", crash_loop),
]


@pytest.mark.slow
@pytest.mark.parametrize(("alert", "story"), FIRES, ids=[f"{alert}-{story.__name__}" for alert, story in FIRES])
def test_an_alert_fires(alert: str, story: Story) -> None:
    assert alert in fired(story, 45 if alert == "LaminaPodNotReady" else 25)


@pytest.mark.slow
@pytest.mark.parametrize("story", [ordinary, asleep, slow_start])
def test_no_alert_fires_on_an_ordinary_day(story: Story) -> None:
    assert fired(story, 40 if story is ordinary else 20) == set()


def test_every_alert_is_fired_by_a_test() -> None:
    assert {alert for alert, _ in FIRES} == {alert.name for alert in ALERTS}


def test_only_clients_mistakes_are_no_failures() -> None:
    mistakes = {problem.name for problem in PROBLEMS.values() if problem.status < 500 and problem.name != "queue-full"}
    assert set(monitoring._NO_FAILURES.split("|")) == {"stop", "length", "cancelled"} | mistakes


def counters() -> Iterator[tuple[str, float]]:
    gateway, stage = Gateway(), StageMetrics()
    for page in (generate_latest(gateway.metrics.registry), generate_latest(stage.registry)):
        for line in page.decode().splitlines():
            found = re.match(r"(lamina_\w+_total)\{(.*)\} (\S+)$", line)
            if found:
                yield f"{found[1]}{{{found[2]}}}", float(found[3])


@pytest.mark.parametrize(
    "series",
    [
        'lamina_gateway_answers_total{outcome="pipeline-unavailable"}',
        'lamina_gateway_answers_total{outcome="stop"}',
        'lamina_gateway_sequences_total{outcome="replays-exhausted"}',
        'lamina_gateway_replays_total{cause="timeout"}',
        'lamina_gateway_replays_total{cause="rebooted"}',
        'lamina_gateway_migrations_total{cause="leaving"}',
        'lamina_gateway_stage_steps_total{stage="0:6"}',
        'lamina_stage_events_total{status="500",type="dev.lamina.forward"}',
        'lamina_stage_events_total{status="503",type="dev.lamina.warmup"}',
        'lamina_stage_rows_total{status="full"}',
    ],
)
def test_counters_start_at_zero(series: str) -> None:
    assert dict(counters())[series] == 0.0
