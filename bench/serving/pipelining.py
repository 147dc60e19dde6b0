"""Do micro-batches keep the slowest stage busy? Stages that sleep a stated time per pass, as processes, behind real HTTP.

    python -m bench.serving.pipelining

For each setting: steps per second of micro-batches over what the slowest stage could do alone (1 / its seconds), and the CPU
that the gateway spends on one hop (one event at one stage, with eight rows). Without merging in the stages, so that a pass is
one micro-batch; the loss is what the pipeline's bubbles, HTTP and the gateway take.
"""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, Final, Self, cast

import click
from rich.console import Console
from rich.table import Table

from eventing.http.delivery import Sender
from eventing.wire.events import Cut
from functions.configuration.config import StageConfig, read_config
from functions.gateway.scheduling.batching import SchedulerLimits
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.scheduling.sequence import Prompt
from functions.gateway.stages.client import PipelineIdentity, StageClient
from functions.gateway.stages.routes import Placement

FINGERPRINT: Final = "0123456789abcdef0123456789abcdef"
TOKEN: Final = "bench"
ROWS: Final = 8
MODEL: Final = {
    "num_hidden_layers": 3,
    "hidden_size": 576,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


@dataclass(frozen=True, slots=True)
class Sleeping:
    """Stages that sleep instead of computing."""

    seconds: tuple[float, ...]
    """Of a pass, per stage."""
    cut: Cut
    fingerprint: str = FINGERPRINT
    token: str = TOKEN
    max_merge: int = 1

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        """A layer for each."""
        return cls(tuple(seconds), tuple((stage, stage + 1) for stage in range(len(seconds))))


def stage_config(index: int, stages: Sleeping) -> StageConfig:
    first, last = stages.cut[index]
    environ = {
        "LAMINA_ROLE": "stage",
        "LAMINA_PIPELINE": stages.fingerprint,
        "LAMINA_PIPELINE_TOKEN": stages.token,
        "LAMINA_MODEL": "sleep",
        "LAMINA_DTYPE": "bfloat16",
        "LAMINA_CUT": ",".join(f"{first}:{last}" for first, last in stages.cut),
        "LAMINA_LAYERS": f"{first}:{last}",
        "LAMINA_STORE_ENDPOINT": "http://127.0.0.1:9",
        "LAMINA_STORE_BUCKET": "none",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
    }
    return cast("StageConfig", read_config(environ))


def serve_stage(index: int, stages: Sleeping, address: Connection) -> None:
    """The process of one stage."""
    from functions.configuration.pass_times import PassTimes
    from functions.hosting.management import Management
    from functions.hosting.server import Server, Service
    from functions.stage.engine.engine import Engine
    from functions.stage.models.sleep_group import SleepGroup
    from functions.stage.serving.app import create_app, stage_admission
    from functions.stage.serving.handlers import EventHandlers
    from functions.stage.serving.metrics import StageMetrics

    times = PassTimes(fixed_seconds=stages.seconds[index])
    model = {**MODEL, "num_hidden_layers": stages.cut[-1][1]}
    group = SleepGroup(model, *stages.cut[index], 2**32, times)
    num_stages = len(stages.cut)
    engine = Engine(group, num_stages=num_stages, max_merge=stages.max_merge, idle_sequence_seconds=600.0)
    engine.start()
    readiness = SimpleNamespace(engine=lambda wait_seconds=0.0: engine, phases=dict)
    handlers = EventHandlers(stage_config(index, stages), f"stage-{index}", cast("Any", readiness))
    metrics = StageMetrics()
    management = Management(metrics.registry, sick=lambda: None, ready=lambda: (True, {}))
    application = create_app(handlers, metrics, stages.token)
    service = Service(application, management, stage_admission(stages.token), threads=64, request_bytes=2**29)
    server = Server("127.0.0.1", 0, 0)
    address.send(f"http://127.0.0.1:{server.port}")
    server.run(service, lambda: None)


@contextmanager
def sleeping_stages(stages: Sleeping) -> Iterator[list[str]]:
    """Their URLs."""
    spawn = multiprocessing.get_context("spawn")
    processes, urls = [], []
    for index in range(len(stages.cut)):
        here, there = spawn.Pipe()
        process = spawn.Process(target=serve_stage, args=(index, stages, there), daemon=True)
        process.start()
        processes.append(process)
        urls.append(here)
    try:
        yield [connection.recv() for connection in urls]
    finally:
        for process in processes:
            process.terminate()
            process.join()


def measure(seconds: Sequence[float], micro_batches: int, duration_seconds: float) -> tuple[float, float]:
    """Micro-batch steps per second, and the gateway's CPU seconds per hop."""
    with sleeping_stages(Sleeping.of(seconds)) as urls, Sender() as sender:
        identity = PipelineIdentity(FINGERPRINT, TOKEN, "/gateways/bench", tuple(range(len(seconds))))
        scheduler = Scheduler(
            StageClient(sender, identity, 30.0),
            Placement(urls, watched=False),
            SchedulerLimits(micro_batch_sequences=ROWS, queue_limit=1000),
        )
        streams = [scheduler.submit(Prompt([1, 2, 3, number], 8000)) for number in range(ROWS * micro_batches)]
        for stream in streams[:ROWS]:
            stream.next_token(60)
        time.sleep(1.0)
        before, cpu, began = scheduler.stats(), time.process_time(), time.monotonic()
        time.sleep(duration_seconds)
        after, cpu, took = scheduler.stats(), time.process_time() - cpu, time.monotonic() - began
        for stream in streams:
            stream.cancel()
        scheduler.close()
    hops = sum(stage.steps for stage in after.stages) - sum(stage.steps for stage in before.stages)
    return (after.stages[-1].steps - before.stages[-1].steps) / took, cpu / hops


@click.command(help=__doc__)
@click.option("--seconds", "duration_seconds", default=6.0, show_default=True, help="How long each setting is measured.")
@click.option(
    "--micro-batches", default=8, show_default=True, help="Work for so many; the scheduler admits what capacity allows."
)
def main(duration_seconds: float, micro_batches: int) -> None:
    table = Table(title=f"Stages that sleep, {micro_batches} micro-batches of {ROWS} sequences")
    for column in ("ms per pass", "steps/s", "slowest stage alone", "ratio", "gateway CPU per hop"):
        table.add_column(column, justify="right")
    for setting in ((0.02, 0.02, 0.02), (0.02, 0.06, 0.02), (0.001, 0.001, 0.001)):
        rate, cpu = measure(setting, micro_batches, duration_seconds)
        bound = 1 / max(setting)
        name = "/".join(f"{seconds * 1000:g}" for seconds in setting)
        table.add_row(name, f"{rate:.1f}", f"{bound:.1f}", f"{rate / bound:.2f}", f"{cpu * 1000:.3f} ms")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
