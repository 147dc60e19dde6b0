"""Many small models on few devices: a fleet with `max_devices`, beside a static pod for each model and KPA without a bound."""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal

import yaml
from rich.console import Console

from bench.many.conversations import Conversation, ask
from bench.peers.models import model
from bench.report import Verdict, judged, table
from knative.commands.local_fleet import LocalFleet
from knative.local.platform import Platform, PlatformOptions, running_platform
from storage.models.publisher import publish
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore

Mode = Literal["static", "KPA", "fleet"]
MODES: Final[Mapping[Mode, str]] = {
    "static": "a static pod for each model",
    "KPA": "KPA for each, no bound",
    "fleet": "`max_devices`",
}
RATE: Final = 0.5  # requests a second
TOKENS: Final = 16
_COUNT_SECONDS: Final = 0.1
_READY_SECONDS: Final = 180.0
_MOST_SLOWER: Final = 1.1  # first token's p95, of KPA's
_FLEET: Final = "models"


@dataclass(slots=True)
class Found:
    """The findings for one mode."""

    answers: Sequence[Conversation] = ()
    replica_seconds: float = 0.0
    peak: int = 0  # pods at once, those that leave included
    seconds: float = 0.0
    first_seconds: list[float] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        return [each.error for each in self.answers if each.error]

    @property
    def p95(self) -> float:
        return quantiles(self.first_seconds, n=20, method="inclusive")[18]

    def __str__(self) -> str:
        return (
            f"first token p50 {median(self.first_seconds):.2f} s, p95 {self.p95:.2f} s, {len(self.failures)} failures of "
            f"{len(self.answers)}, {self.replica_seconds:.0f} replica-seconds in {self.seconds:.0f} s, at most {self.peak} pods"
        )


async def measure(mode: Mode, members: int, devices: int, seconds: float, state: Path) -> Found:
    """Runs the fleet with real stages, and sends the same requests in each mode."""
    source = Path(model("tiny", state).source)
    with TemporaryDirectory() as folder, EmbeddedStore(state / "few-devices-store") as embedded:
        store = ObjectStore(embedded.settings)
        for number in range(members):
            publish(source, store, _model(number), "bfloat16")
        file, logs = Path(folder) / "fleet.yaml", Path(folder) / "logs"
        logs.mkdir()
        file.write_text(yaml.safe_dump(_document(mode, members, devices)))
        local = LocalFleet(file, store, {}, Path(folder) / "cache", "0" * 64, Console(quiet=True))
        # The gateway comes last, because knative/local starts new Services warm while others have pods.
        objects = sorted(local.objects, key=lambda each: each["metadata"]["name"] == _FLEET)
        async with running_platform(PlatformOptions(secrets=local.secrets, logs=logs), objects) as platform:
            wanted = members if mode == "static" else 0
            async with asyncio.timeout(_READY_SECONDS):
                while not _ready(platform, gateway=True) or _ready(platform) < wanted:
                    await asyncio.sleep(_COUNT_SECONDS)
            return await _asked(platform, members, seconds)


def _document(mode: Mode, members: int, devices: int) -> dict[str, Any]:
    one = {"min_scale": 1, "max_scale": 1, "initial_scale": 1}
    stage: dict[str, Any] = {"resources": {"cpu": "1", "memory": "1200Mi"}, "kv_cache": "8Mi", "threads": 1}
    # The fleet gives its members the same window and no delay.
    stage["autoscaling"] = one if mode == "static" else {"max_scale": 1, "window_seconds": 6, "scale_down_delay_seconds": 0}
    return {
        "kind": "Fleet",
        "name": _FLEET,
        "image": "lamina:local",
        "store": {"endpoint": "http://embedded.invalid"},
        "gateway": {"autoscaling": one, "access_log": "off"},
        **({"max_devices": devices} if mode == "fleet" else {}),
        "members": [
            {"name": f"m{number}", "model": {"name": _model(number), "dtype": "bfloat16"}, "stages": 1, "stage": stage}
            for number in range(members)
        ],
    }


async def _asked(platform: Platform, members: int, seconds: float) -> Found:
    found, dice = Found(), random.Random(7)
    weights = [1 / rank for rank in range(1, members + 1)]
    counting = asyncio.create_task(_count(platform, found))
    began, due = time.perf_counter(), 0.0
    asked: list[asyncio.Task[Conversation]] = []
    while (due := due + dice.expovariate(RATE)) < seconds:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        body: dict[str, object] = {
            "model": _model(dice.choices(range(members), weights)[0]),
            "prompt": f"Say it {len(asked)} times",
            "stream": True,
            "temperature": 0,
            "max_tokens": TOKENS,
            "ignore_eos": True,
        }
        asked.append(asyncio.create_task(ask(platform.url(_FLEET), body, TOKENS)))
    found.answers = await asyncio.gather(*asked)
    found.seconds = time.perf_counter() - began
    counting.cancel()
    found.first_seconds = [each.moments[0] - each.began for each in found.answers if each.moments]
    return found


async def _count(platform: Platform, found: Found) -> None:
    last = time.perf_counter()
    while True:
        await asyncio.sleep(_COUNT_SECONDS)
        now = time.perf_counter()
        pods = sum(len(each.pods) for _, each in _revisions(platform))
        found.replica_seconds += pods * (now - last)
        found.peak, last = max(found.peak, pods), now


def _ready(platform: Platform, *, gateway: bool = False) -> int:
    return sum(len(each.ready_pods) for _, each in _revisions(platform, gateway=gateway))


def _revisions(platform: Platform, *, gateway: bool = False) -> list[tuple[str, Any]]:
    services = platform.services.items()
    return [(name, each) for (_, name), service in services if (name == _FLEET) == gateway for each in service.revisions]


def _model(number: int) -> str:
    return f"model-{number}"


def verdicts(found: Mapping[Mode, Found], devices: int) -> list[Verdict]:
    fleet = found["fleet"]
    return [
        judged("pods at once", fleet.peak, devices, at_most=True, number="{:.0f}"),
        judged("failures", len(fleet.failures), 0, at_most=True, number="{:.0f}"),
        judged("first token's p95, of KPA's without a bound", fleet.p95 / found["KPA"].p95, _MOST_SLOWER, at_most=True),
    ]


def markdown(found: Mapping[Mode, Found], devices: int, facts: str) -> str:
    columns = ["", "first token p50, p95", "failures", "replica-seconds", "most pods at once"]
    rows = [
        [
            MODES[mode],
            f"{median(each.first_seconds):.2f}, {each.p95:.2f} s",
            f"{len(each.failures)} of {len(each.answers)}",
            f"{each.replica_seconds:.0f}",
            each.peak,
        ]
        for mode, each in found.items()
    ]
    told = [f"* {verdict}." for verdict in verdicts(found, devices)]
    return "\n".join(["## Many models on few devices", "", facts, "", table(columns, rows), "", *told])
