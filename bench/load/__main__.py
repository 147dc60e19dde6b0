"""`make bench-load`: the load 0 → 1 → 16 → 64 → 4 → 0 on a pipeline that scales by itself (`python -m bench.load`).

Everything is real but the arithmetic: publication, manifests, platform, autoscaler, gateway, HTTP. Each stage sleeps a declared
time per pass instead of computing, because two cores hold no more compute than two cores, however many pods share them.
`--compute` runs the same pipeline with the model's own layers.

Writes a picture and a section of docs/benchmarks.md; status 1 if a target is missed.
"""

import asyncio
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from bench.load.report import Setting, draw, judge, markdown
from bench.load.series import read_records
from bench.pipeline import local_spec, running_platform
from bench.records import Record
from bench.report import ROOT, STATE, machine, write_section
from knative.commands.local_pipeline import LocalPipeline, ensure_published, local_pipeline
from knative.commands.options import STORE_FOLDER
from knative.commands.state_folder import RunningPlatform, StateFolder
from knative.local.platform import PlatformOptions
from knative.render.services import services
from knative.spec.pipeline_spec import PipelineSpec
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One of the two runs."""

    section: str
    picture: Path
    plan: str
    max_tokens: tuple[int, int]
    sleep_seconds: tuple[float, ...] | None  # per stage; None: real layers
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


def _spec(run: Run) -> PipelineSpec:
    return local_spec(
        "load",
        model={"name": "smollm2-135m-instruct", "dtype": "bfloat16"},
        stages=3,
        stage={
            "resources": {"cpu": "1", "memory": "2Gi"},
            "layer_group": "sleep" if run.sleep_seconds else "auto",
            "sleep_seconds": run.sleep_seconds,
            "autoscaling": {"max_scale": run.max_scale},
        },
        gateway={"micro_batch_sequences": run.micro_batch_sequences, "prefix_sharing": "pipeline"},
    )


async def _record(run: Run, state: StateFolder, local: LocalPipeline, store: ObjectStore, output: Path) -> None:
    """Runs the pipeline on a platform of its own, from zero, and loads it. Raises RuntimeError.

    The load generator has a process of its own, so that it takes no time of the platform's event loop.
    """
    async with running_platform(PlatformOptions(secrets=local.secrets, logs=state.logs), services(local.pipeline)) as platform:
        url = platform.url(local.pipeline.spec.name)
        state.publish(RunningPlatform(platform.status()["pid"], platform.admin_url, url, store.settings))
        options = ["--plan", run.plan, "--max-tokens", *map(str, run.max_tokens)]
        options += ["--metrics", f"{platform.admin_url}/metrics", "--output", str(output)]
        command = [sys.executable, "-m", "bench.load.conversations", url, *options]
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
        try:
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
        if status not in (0, 1):
            raise RuntimeError(f"the load generator ended with status {status}")


def _write(run: Run, model: str, setting: Setting, records: Sequence[Record]) -> None:
    command = "python -m bench.load" + ("" if run.sleep_seconds else " --compute")
    draw(records, run.picture, f"{model} in {len(setting.stages)} stages: {command}")
    if run.sleep_seconds:
        title = "Load that rises and falls, stages that sleep"
        stages = "/".join(f"{seconds * 1000:g}" for seconds in run.sleep_seconds) + " ms per pass instead of computing"
    else:
        title = "The same with real compute"
        stages = "their own layers, whose replicas share these cores: more of them are not more compute"
    text = (
        f"## {title}\n\n`{command}` · {machine()} · {model}, {len(setting.stages)} stages, {stages}; "
        f"micro-batches of at most {run.micro_batch_sequences} sequences, answers of {run.max_tokens[0]} to "
        f"{run.max_tokens[1]} tokens; conversations:seconds {run.plan}; "
        f"all else at its default. The targets and their reasons: [scaling.md](scaling.md).\n\n"
        f"{markdown(setting, records)}\n\n![load, replicas, throughput, time to first token]({run.picture.name})"
    )
    write_section(ROOT / "docs" / "benchmarks.md", run.section, text)


@click.command(help=__doc__)
@click.option("--compute", is_flag=True, help="Real layers instead of sleeping ones, and a shorter load.")
@click.option("--plan", help="Another load, CONVERSATIONS:SECONDS,…: shown, but not written into the documentation.")
@click.option(
    "--state", type=click.Path(path_type=Path), default=STATE / "load", help="State folder; its store keeps the model."
)
def main(compute: bool, plan: str | None, state: Path) -> None:
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    run = COMPUTING if compute else SLEEPING
    run = run if plan is None else replace(run, plan=plan)
    with StateFolder(state) as folder, EmbeddedStore(state / STORE_FOLDER) as embedded:
        store = ObjectStore(embedded.settings)
        spec = _spec(run)
        manifest = ensure_published(store, None, spec.model.dtype, Console())
        local = local_pipeline(store, manifest, spec.stages or 1, spec, {})
        output = state / f"{run.section}.jsonl"
        asyncio.run(_record(run, folder, local, store, output))
    stages = tuple(local.pipeline.stage_name(index) for index in range(len(local.pipeline.cut)))
    setting, records = Setting(stages, run.sleep_seconds, run.micro_batch_sequences), read_records(output)
    click.echo(markdown(setting, records))
    if plan is None:
        _write(run, local.shape.name, setting, records)
    sys.exit(0 if all(verdict.met for verdict in judge(setting, records)) else 1)


if __name__ == "__main__":
    main()
