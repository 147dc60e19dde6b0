"""Stages that sleep a stated time per pass instead of computing, as processes behind real HTTP."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, Final, cast

from eventing.wire.events import Cut
from functions.configuration.config import StageConfig, read_config

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

    seconds: tuple[float, ...]  # of a forward pass, per stage
    cut: Cut
    fingerprint: str
    token: str
    max_merge: int


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
    """Runs the stages and yields their URLs."""
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
