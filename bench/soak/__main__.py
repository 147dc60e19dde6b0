"""`make soak`: hostile clients and a greedy one beside honest ones, while stages and gateways are killed, stages hang and the
store goes away.

SmolLM2 in fp32 on a local platform of its own, with two gateways. Answers are first taken undisturbed, then asked for again and
again beside every kind of hostile client (`bench.soak.attacks`) and every fault (`bench.soak.faults`), and compared with the
first ones token for token. A warm-up with all clients and no fault comes first; at the end every process must be back at what
it used after that. `bench.soak.judge` has the table of verdicts.

Writes a section of docs/benchmarks.md, for the default length only; status 1 if a target is missed. The records
stay, and `--records` reports them again.
"""

import asyncio
import logging
import secrets
from contextlib import closing
from pathlib import Path
from typing import Final

import aiohttp
import click
import msgspec
from rich.console import Console

from bench.pipeline import ALWAYS_ONE, local_spec, module_beside
from bench.records import Record, Recorder, of
from bench.report import STATE, conclude, machine
from bench.soak.attacks import KINDS
from bench.soak.faults import Faults, ReturningStore
from bench.soak.honest import ComeAgain, NoAnswer, take_references
from bench.soak.judge import verdicts
from bench.soak.observe import Observer
from bench.soak.records import (
    GATEWAY,
    GREEDY,
    HOSTILE,
    Answer,
    Attempt,
    Began,
    Broken,
    Fault,
    Health,
    Lost,
    Plan,
    Refused,
    is_gateway,
    read_records,
)
from bench.soak.report import markdown
from knative.commands.local_pipeline import LocalPipeline, ensure_published, local_pipeline
from knative.commands.options import STORE_FOLDER
from knative.commands.state_folder import RunningPlatform, StateFolder
from knative.local.kubelet.pods import PodTiming
from knative.local.platform import Platform, PlatformOptions, running_platform
from knative.render.services import services
from storage.store.object_store import ObjectStore

_STAGES: Final = 3
_MODEL: Final = "smollm2-135m-instruct"
_KEYS_SECRET: Final = "soak-keys"
_GATEWAYS: Final = 2
# Short back-off: otherwise a pod that is killed again and again would be down for most of the run.
_TIMING: Final = PodTiming(restart_backoff_seconds=0.5, restart_backoff_max_seconds=5.0)
_MINUTES: Final = 15.0
_GATEWAY_KILL_SECONDS: Final = 60.0
_WARM_UP_SECONDS: Final = 60.0
_PROGRESS_SECONDS: Final = 15.0


def say(text: str) -> None:
    click.echo(text, err=True)


async def soak(plan: Plan, kill_seconds: float, platform: Platform, store: ReturningStore, recorder: Recorder) -> None:
    """One run on a running platform. Raises RuntimeError if one of its processes fails."""
    observer = Observer(platform, plan, recorder)
    say("taking the undisturbed answers")
    try:
        await take_references(plan, recorder)
    except (NoAnswer, ComeAgain, aiohttp.ClientError) as error:
        raise click.ClickException(f"a question fails even undisturbed: {error}") from error
    say("warming up")
    await _clients(msgspec.structs.replace(plan, seconds=min(_WARM_UP_SECONDS, plan.seconds / 3), seed=plan.seed + 1))
    before = await observer.rest("before")
    kinds = tuple(kind.name for kind in KINDS)
    model = f"{plan.model} in float32"
    gateway_kill_seconds = min(_GATEWAY_KILL_SECONDS, plan.seconds / 4)
    began = (plan.seconds, tuple(plan.services), model, plan.honest, plan.greedy, kill_seconds, gateway_kill_seconds, kinds)
    recorder.write(Began(recorder.now, *began))
    faults = Faults(platform, store, plan, recorder, kill_seconds, gateway_kill_seconds)
    async with module_beside("bench.soak.health", msgspec.json.encode(plan).decode()), asyncio.TaskGroup() as tasks:
        watching = [tasks.create_task(observer.run()), tasks.create_task(_tell(recorder))]
        tasks.create_task(faults.run())
        await _clients(plan)
        for watch in watching:
            watch.cancel()
    say("coming to rest")
    await observer.rest("after", before)


async def _clients(plan: Plan) -> None:
    """Runs all clients until the plan is over. Raises RuntimeError if they fail."""
    async with module_beside("bench.soak.clients", msgspec.json.encode(plan).decode()) as clients:
        if await clients.wait() != 0:
            raise RuntimeError(f"the clients ended with status {clients.returncode}")


async def _tell(recorder: Recorder) -> None:
    while True:
        await asyncio.sleep(_PROGRESS_SECONDS)
        say(progress(await asyncio.to_thread(read_records, recorder.path), recorder.now))


def progress(records: list[Record], now: float) -> str:
    began = of(Began, records)[0]
    slow = max((health.seconds for health in of(Health, records) if is_gateway(health.service)), default=0.0)
    answered = f"{len(of(Answer, records))} answers, {len(of(Refused, records))} refusals"
    failed = f"{len(of(Broken, records))} broken, {len(of(Lost, records))} lost"
    disturbed = f"{len(of(Attempt, records))} hostile attempts, {len(of(Fault, records))} faults"
    when = f"{now - began.t:.0f} of {began.seconds:.0f} s"
    return f"{when}: {answered}, {failed}; {disturbed}; /healthz of a gateway at most {slow:.2f} s"


def run(seconds: float, honest: int, greedy: int, kill_seconds: float, records: Path, state_path: Path) -> None:
    clients = [*(f"honest {number}" for number in range(honest)), GREEDY, HOSTILE]
    keys = {client: secrets.token_hex(16) for client in clients}

    async def whole(state: StateFolder, local: LocalPipeline, store: ReturningStore) -> None:
        records.unlink(missing_ok=True)
        options = PlatformOptions(secrets=local.secrets, logs=state.logs, timing=_TIMING)
        name, stages = local.pipeline.spec.name, local.pipeline.stage_names
        with Recorder(records) as recorder:
            async with running_platform(options, services(local.pipeline)) as platform:
                url = platform.url(name)
                state.publish(RunningPlatform(platform.status()["pid"], platform.admin_url, url, store.settings))
                plan = Plan(
                    records=str(records),
                    started=recorder.started,
                    seconds=seconds,
                    url=url,
                    admin_url=platform.admin_url,
                    services={
                        **{f"{GATEWAY} {index}": name for index in range(_GATEWAYS)},
                        **{f"stage {index}": stage for index, stage in enumerate(stages)},
                    },
                    model=local.manifest.name,
                    keys=keys,
                    greedy=greedy,
                )
                await soak(plan, kill_seconds, platform, store, recorder)

    spec = local_spec(
        "soak",
        model={"name": _MODEL, "dtype": "float32"},  # answers must be equal token for token
        stages=_STAGES,
        stage={"resources": {"cpu": "2", "memory": "2Gi"}, "busy_threads": 1, "kv_cache": "128Mi", "autoscaling": ALWAYS_ONE},
        gateway={
            "micro_batch_sequences": 4,  # the greedy client's connections fill the queue
            "api_keys_secret": _KEYS_SECRET,
            "autoscaling": {"min_scale": _GATEWAYS, "max_scale": _GATEWAYS},
        },
    )
    with StateFolder(state_path) as state, closing(ReturningStore(state_path / STORE_FOLDER)) as returning:
        store = ObjectStore(returning.settings)
        manifest = ensure_published(store, _MODEL, spec.model.dtype, Console())
        named_secrets = {_KEYS_SECRET: {"api-keys": ",".join(keys.values())}}
        asyncio.run(whole(state, local_pipeline(store, manifest, _STAGES, spec, named_secrets), returning))


@click.command(help=__doc__)
@click.option("--minutes", type=click.FloatRange(min=0.5), default=_MINUTES, show_default=True, help="Of disturbance.")
@click.option("--honest", type=click.IntRange(min=1), default=4, show_default=True, help="Honest clients, each with a key.")
@click.option("--greedy", type=click.IntRange(min=1), default=96, show_default=True, help="Connections of the greedy client.")
@click.option(
    "--kill-seconds", type=click.FloatRange(min=1), default=20.0, show_default=True, help="Between two kills of stages."
)
@click.option("--state", type=click.Path(path_type=Path), default=STATE / "soak", help="Its store keeps the model.")
@click.option("--records", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Report these; run nothing.")
@click.option("--print-only", is_flag=True, help="Leave docs/ alone.")
def main(
    minutes: float, honest: int, greedy: int, kill_seconds: float, state: Path, records: Path | None, print_only: bool
) -> None:
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    if records is None:
        records = state / "soak.jsonl"
        run(minutes * 60, honest, greedy, kill_seconds, records, state)
    found = read_records(records)
    began = of(Began, found)[0]
    text = (
        f"## Soak\n\n`python -m bench.soak` · {machine()} · {began.model}, {_GATEWAYS} gateways and {_STAGES} stages of one "
        f"pod each, {len(began.honest)} honest clients with one question at a time and a greedy one with {began.greedy}, "
        f"{began.seconds / 60:g} minutes, a stage killed every {began.kill_seconds:g} seconds, a gateway every "
        f"{began.gateway_kill_seconds:g}. A hostile client that opens several connections counts once for each.\n\n"
        f"{markdown(found)}"
    )
    conclude("soak", text, verdicts(found), write=not print_only and began.seconds >= _MINUTES * 60)


if __name__ == "__main__":
    main()
