"""`make bench-load`: the load 0 → 1 → 16 → 64 → 4 → 0 on a pipeline that scales by itself (`python -m bench.load`).

Everything is real but the arithmetic: publication, manifests, platform, autoscaler, gateway, HTTP. Each stage sleeps a declared
time per pass instead of computing, because two cores hold no more compute than two cores, however many pods share them.

Writes a picture and a section of docs/benchmarks.md; status 1 if a target is missed.
"""

import asyncio
import logging
from pathlib import Path
from typing import Final

import click

from bench.load.report import Setting, draw, judge, markdown
from bench.load.series import read_records
from bench.pipeline import local_spec, module_beside, published_pipeline
from bench.report import DOCUMENT, STATE, conclude, machine
from knative.commands.local_pipeline import LocalPipeline
from knative.commands.model_choice import DEFAULT_MODEL
from knative.commands.state_folder import RunningPlatform, StateFolder
from knative.local.platform import PlatformOptions, running_platform
from knative.render.services import services
from storage.store.settings import StoreSettings

_PICTURE: Final = DOCUMENT.with_name("load.png")
_PLAN: Final = "0:5,1:30,16:40,64:50,4:30,0:285"
_MAX_TOKENS: Final = (96, 160)
_SLEEP_SECONDS: Final = (0.03, 0.09, 0.03)
_MICRO_BATCH_SEQUENCES: Final = 16


async def _record(plan: str, state: StateFolder, local: LocalPipeline, store: StoreSettings, output: Path) -> None:
    """Runs the pipeline on a platform of its own, from zero, and loads it. Raises RuntimeError."""
    async with running_platform(PlatformOptions(secrets=local.secrets, logs=state.logs), services(local.pipeline)) as platform:
        url = platform.url(local.pipeline.spec.name)
        state.publish(RunningPlatform(platform.status()["pid"], platform.admin_url, url, store))
        options = ["--plan", plan, "--max-tokens", *map(str, _MAX_TOKENS)]
        options += ["--metrics", f"{platform.admin_url}/metrics", "--output", str(output)]
        async with module_beside("bench.load.conversations", url, *options) as process:
            status = await process.wait()
        if status not in (0, 1):
            raise RuntimeError(f"the load generator ended with status {status}")


@click.command(help=__doc__)
@click.option("--plan", help="Another load, CONVERSATIONS:SECONDS,…: shown, but not written into the documentation.")
@click.option(
    "--state", type=click.Path(path_type=Path), default=STATE / "load", help="State folder; its store keeps the model."
)
def main(plan: str | None, state: Path) -> None:
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    spec = local_spec(
        "load",
        model={"name": DEFAULT_MODEL, "dtype": "bfloat16"},
        stages=3,
        stage={
            "resources": {"cpu": "1", "memory": "2Gi"},
            "layer_group": "sleep",
            "sleep_seconds": _SLEEP_SECONDS,
            "autoscaling": {"max_scale": 6},
        },
        gateway={"micro_batch_sequences": _MICRO_BATCH_SEQUENCES, "prefix_sharing": "pipeline"},
    )
    output = state / "load.jsonl"
    with StateFolder(state) as folder, published_pipeline(spec, state) as (local, store):
        asyncio.run(_record(plan or _PLAN, folder, local, store.settings, output))
    stages = tuple(local.pipeline.stage_name(index) for index in range(len(local.pipeline.cut)))
    setting, records = Setting(stages, _SLEEP_SECONDS, _MICRO_BATCH_SEQUENCES), read_records(output)
    model = local.shape.name
    passes = "/".join(f"{seconds * 1000:g}" for seconds in _SLEEP_SECONDS)
    text = (
        f"## Load that rises and falls, stages that sleep\n\n`python -m bench.load` · {machine()} · {model}, {len(stages)} "
        f"stages, {passes} ms per pass instead of computing; micro-batches of at most {_MICRO_BATCH_SEQUENCES} sequences, "
        f"answers of {_MAX_TOKENS[0]} to {_MAX_TOKENS[1]} tokens; conversations:seconds {plan or _PLAN}; all else at its "
        f"default. The targets and their reasons: [scaling.md](scaling.md).\n\n{markdown(setting, records)}\n\n"
        f"![load, replicas, throughput, time to first token]({_PICTURE.name})"
    )
    if plan is None:
        draw(records, _PICTURE, f"{model} in {len(stages)} stages: python -m bench.load")
    conclude("load", text, judge(setting, records), write=plan is None)


if __name__ == "__main__":
    main()
