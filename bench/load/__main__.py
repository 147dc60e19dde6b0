"""The load 0 → 1 → 16 → 64 → 4 → 0 on a pipeline that scales by itself: `python -m bench.load`.

Everything is real but the arithmetic: publication, manifests, platform, autoscaler, gateway, HTTP. Each stage waits a declared
time per pass in place of computing, because two cores hold no more compute than two cores, however many pods there are.
`--compute` runs the same pipeline with the model's own layers, for what that is worth on this machine.

Writes a picture and a section of docs/benchmarks.md; status 1 where something that must show did not.
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from bench.load.plot import draw
from bench.load.report import Setting, judge, markdown
from bench.load.series import Record, read_records
from bench.report import machine, write_section
from knative.commands.sources.local_pipeline import LocalPipeline, ensure_published, local_pipeline
from knative.commands.sources.state_folder import RunningPlatform, StateFolder
from knative.commands.sources.store_access import STORE_FOLDER
from knative.local.platform import ROOT, Platform, PlatformOptions
from knative.render.services import services
from knative.spec.pipeline_spec import Autoscaling, GatewaySpec, ModelSpec, PipelineSpec, Resources, StageSpec, StoreSpec
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore

_DOCUMENT: Final = ROOT / "docs" / "benchmarks.md"
_STATE: Final = ROOT / ".lamina" / "load"
_STOP_SECONDS: Final = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One of the two runs."""

    section: str
    picture: Path
    plan: str
    max_tokens: tuple[int, int]
    sleep_seconds: tuple[float, ...] | None
    """Per stage; None: real layers."""
    micro_batch_sequences: int
    max_scale: int


SLEEPING: Final = Run(
    section="load",
    picture=ROOT / "docs" / "load.png",
    plan="0:5,1:30,16:40,64:50,4:30,0:285",
    max_tokens=(96, 160),
    sleep_seconds=(0.03, 0.09, 0.03),
    micro_batch_sequences=16,
    max_scale=6,
)
COMPUTING: Final = Run(
    section="load-compute",
    picture=ROOT / "docs" / "load-compute.png",
    plan="0:5,1:15,8:40,1:15,0:5",
    max_tokens=(16, 48),
    sleep_seconds=None,
    micro_batch_sequences=8,
    max_scale=2,
)


def spec_of(run: Run) -> PipelineSpec:
    """What is run. Everything that is not said here is a default."""
    return PipelineSpec(
        name="load",
        model=ModelSpec(name="smollm2-135m-instruct", dtype="bfloat16"),
        stages=3,
        image="lamina:local",
        stage=StageSpec(
            resources=Resources(cpu="1", memory="2Gi"),
            layer_group="sleep" if run.sleep_seconds else "auto",
            sleep_seconds=list(run.sleep_seconds) if run.sleep_seconds else None,
            autoscaling=Autoscaling(max_scale=run.max_scale),
        ),
        gateway=GatewaySpec(micro_batch_sequences=run.micro_batch_sequences),
        store=StoreSpec(endpoint="http://127.0.0.1"),
    )


@contextlib.asynccontextmanager
async def serving(state: StateFolder, local: LocalPipeline, store: ObjectStore) -> AsyncIterator[Platform]:
    """The pipeline on a platform of its own, all at zero."""
    platform = Platform(PlatformOptions(secrets=local.secrets, logs=state.logs))
    await platform.start()
    try:
        await platform.apply(services(local.pipeline))
        url = platform.url(local.pipeline.spec.name)
        state.publish(RunningPlatform(platform.status()["pid"], platform.admin_url, url, store.settings))
        yield platform
    finally:
        await platform.stop(_STOP_SECONDS)


async def generate_load(run: Run, platform: Platform, output: Path) -> None:
    """In a process of its own, so that it takes nothing from the platform's event loop. Raises RuntimeError."""
    command = [
        *(
            sys.executable,
            "-m",
            "bench.load.conversations",
            platform.url("load"),
            "--plan",
            run.plan,
            "--max-tokens",
            *map(str, run.max_tokens),
        ),
        *("--metrics", f"{platform.admin_url}/metrics", "--output", str(output)),
    ]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
    try:
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    if status not in (0, 1):
        raise RuntimeError(f"the load generator ended with status {status}")


async def _record(run: Run, state: StateFolder, local: LocalPipeline, store: ObjectStore, output: Path) -> None:
    async with serving(state, local, store) as platform:
        await generate_load(run, platform, output)


def _setting(run: Run, local: LocalPipeline) -> Setting:
    stages = tuple(local.pipeline.stage_name(index) for index in range(len(local.pipeline.cut)))
    return Setting(stages, run.sleep_seconds, run.micro_batch_sequences)


def _document(run: Run, local: LocalPipeline, setting: Setting, records: Sequence[Record]) -> None:
    command = "python -m bench.load" + ("" if run.sleep_seconds else " --compute")
    draw(records, run.picture, f"{local.shape.name} in {len(setting.stages)} stages: {command}")
    if run.sleep_seconds:
        title = "Load that rises and falls, stages that sleep"
        stages = "/".join(f"{seconds * 1000:g}" for seconds in run.sleep_seconds) + " ms per pass in place of computing"
    else:
        title = "The same with real compute"
        stages = "their own layers, whose replicas share these cores: more of them are not more compute"
    text = (
        f"## {title}\n\n`{command}` · {machine()} · {local.shape.name}, {len(setting.stages)} stages, {stages}; "
        f"micro-batches of at most {run.micro_batch_sequences} sequences, answers of {run.max_tokens[0]} to "
        f"{run.max_tokens[1]} tokens; conversations:seconds {run.plan}; "
        f"all else at its default. What is judged, and why it is set so: [scaling.md](scaling.md).\n\n"
        f"{markdown(setting, records)}\n\n![load, replicas, throughput, time to first token]({run.picture.name})"
    )
    write_section(_DOCUMENT, run.section, text)


@click.command(help=__doc__)
@click.option("--compute", is_flag=True, help="Real layers in place of sleeping ones, and a shorter load.")
@click.option("--plan", help="Another load, CONVERSATIONS:SECONDS,…: shown, but not written into the documentation.")
@click.option("--state", type=click.Path(path_type=Path), default=_STATE, help="State folder; its store keeps the model.")
def main(compute: bool, plan: str | None, state: Path) -> None:
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    run = COMPUTING if compute else SLEEPING
    run = run if plan is None else replace(run, plan=plan)
    with StateFolder(state) as folder, EmbeddedStore(state / STORE_FOLDER) as embedded:
        store = ObjectStore(embedded.settings)
        spec = spec_of(run)
        manifest = ensure_published(store, None, spec.model.dtype, Console())
        local = local_pipeline(store, manifest, spec.stages or 1, spec, {})
        output = state / f"{run.section}.jsonl"
        asyncio.run(_record(run, folder, local, store, output))
    setting, records = _setting(run, local), read_records(output)
    click.echo(markdown(setting, records))
    if plan is None:
        _document(run, local, setting, records)
    sys.exit(0 if all(verdict.holds for verdict in judge(setting, records)) else 1)


if __name__ == "__main__":
    main()
