"""Clients that misbehave beside honest ones, while stages are killed and hang and the store goes away: `python -m bench.soak`.

SmolLM2 in fp32 on a local platform of its own. Answers are first taken undisturbed, then asked for again and again beside
every kind of hostile client (`bench.soak.hostile`) and every fault (`bench.soak.faults`), and held against the first ones
token for token. A round ends with a lull without hostile clients; from lull to lull no process may grow.

Writes a picture and a section of docs/benchmarks.md, of the default length only; status 1 where something that must show did
not. The records stay, and `--records` tells them again.
"""

import asyncio
import contextlib
import logging
import secrets
import sys
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import click
import msgspec
from rich.console import Console

from bench.report import machine, write_section
from bench.soak.faults import Faults
from bench.soak.honest import ComeAgain, NoAnswer, take_references
from bench.soak.hostile import KINDS
from bench.soak.observe import Observer
from bench.soak.pipeline import KEYS_SECRET, MODEL, ReturningStore, services_of, serving, spec_of
from bench.soak.plot import draw
from bench.soak.records import (
    GATEWAY,
    Answer,
    Attempt,
    Began,
    Fault,
    Health,
    Lost,
    Plan,
    Record,
    Recorder,
    Refused,
    of,
    read_records,
)
from bench.soak.report import markdown, verdicts
from knative.commands.local_pipeline import LocalPipeline, ensure_published, local_pipeline
from knative.commands.options import STORE_FOLDER
from knative.commands.state_folder import StateFolder
from knative.local.platform import ROOT, Platform
from storage.store.object_store import ObjectStore

_DOCUMENT: Final = ROOT / "docs" / "benchmarks.md"
_PICTURE: Final = ROOT / "docs" / "soak.png"
_STATE: Final = ROOT / ".lamina" / "soak"
_STAGES: Final = 3
_MINUTES: Final = 15.0
_PROGRESS_SECONDS: Final = 15.0
_END_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Options:
    seconds: float
    honest: int
    kill_seconds: float
    records: Path


def say(text: str) -> None:
    click.echo(text, err=True)


class Soak:
    """One run, on a platform that is there."""

    def __init__(self, options: Options, local: LocalPipeline, platform: Platform, store: ReturningStore, recorder: Recorder):
        honest_key, hostile_key = local.secrets[KEYS_SECRET]["api-keys"].split(",")
        self._options = options
        self._platform = platform
        self._store = store
        self._recorder = recorder
        self._plan = Plan(
            records=str(options.records),
            started=recorder.started,
            seconds=options.seconds,
            url=platform.url(local.pipeline.spec.name),
            admin_url=platform.admin_url,
            services=services_of(local),
            model=local.manifest.name,
            honest_key=honest_key,
            hostile_key=hostile_key,
            honest=options.honest,
        )

    async def run(self) -> None:
        """Raises RuntimeError where a process of the run's own fails."""
        observer = Observer(self._platform, self._plan, self._recorder)
        say("taking the undisturbed answers")
        try:
            await take_references(self._plan, self._recorder)
        except (NoAnswer, ComeAgain, aiohttp.ClientError) as error:
            raise click.ClickException(f"not even undisturbed is a question answered: {error}") from error
        await observer.rest("before")
        before = observer.seen
        self._recorder.write(self._beginning())
        async with self._background(observer.run()), self._background(self._tell()), self._process("bench.soak.health"):
            await self._disturb()
        say("coming to rest")
        await observer.rest("after", before)

    def _beginning(self) -> Began:
        return Began(
            self._recorder.now,
            self._options.seconds,
            tuple(self._plan.services),
            f"{self._plan.model} in float32",
            self._options.honest,
            self._options.kill_seconds,
            tuple(kind.name for kind in KINDS),
        )

    async def _disturb(self) -> None:
        faults = Faults(self._platform, self._store, self._plan, self._recorder, self._options.kill_seconds)
        async with self._process("bench.soak.clients") as clients, asyncio.TaskGroup() as tasks:
            tasks.create_task(faults.run())
            if await clients.wait() != 0:
                raise RuntimeError(f"the clients ended with status {clients.returncode}")

    @contextlib.asynccontextmanager
    async def _process(self, module: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """Ended at the end."""
        plan = msgspec.json.encode(self._plan).decode()
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", module, plan, cwd=ROOT)
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), _END_SECONDS)

    @contextlib.asynccontextmanager
    async def _background(self, work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
        """Cancelled at the end; what it failed with is raised then."""
        task = asyncio.create_task(work)
        try:
            yield
            if task.done():
                task.result()
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            records = await asyncio.to_thread(read_records, self._options.records)
            say(progress(records, self._recorder.now))


def progress(records: list[Record], now: float) -> str:
    began = of(Began, records)[0]
    slow = max((health.seconds for health in of(Health, records) if health.service == GATEWAY), default=0.0)
    honest = f"{len(of(Answer, records))} answers, {len(of(Refused, records))} refusals, {len(of(Lost, records))} lost"
    disturbed = f"{len(of(Attempt, records))} hostile attempts, {len(of(Fault, records))} faults"
    return f"{now - began.t:.0f} of {began.seconds:.0f} s: {honest}; {disturbed}; /healthz of the gateway at most {slow:.2f} s"


async def soak(options: Options, state: StateFolder, local: LocalPipeline, store: ReturningStore) -> None:
    options.records.unlink(missing_ok=True)
    with Recorder(options.records) as recorder:
        async with serving(state, local, store.settings) as platform:
            await Soak(options, local, platform, store, recorder).run()


def run(options: Options, state_path: Path) -> None:
    with StateFolder(state_path) as state, ReturningStore(state_path / STORE_FOLDER) as returning:
        store = ObjectStore(returning.settings)
        spec = spec_of(_STAGES)
        manifest = ensure_published(store, MODEL, spec.model.dtype, Console())
        keys = {KEYS_SECRET: {"api-keys": f"{secrets.token_hex(16)},{secrets.token_hex(16)}"}}
        local = local_pipeline(store, manifest, _STAGES, spec, keys)
        asyncio.run(soak(options, state, local, returning))


def _document(records: list[Record]) -> None:
    began = of(Began, records)[0]
    draw(records, _PICTURE, f"{began.model}, {began.seconds / 60:g} minutes: make soak")
    text = (
        f"## Soak\n\n`python -m bench.soak` · {machine()} · {began.model}, {len(began.services) - 1} stages of one pod each, "
        f"{began.honest} honest clients at a time, {began.seconds / 60:g} minutes, a stage killed every {began.kill_seconds:g} "
        f"seconds. A client that opens several connections is counted for each.\n\n{markdown(records)}\n\n"
        f"![answers and faults, health, threads, descriptors, memory]({_PICTURE.name})"
    )
    write_section(_DOCUMENT, "soak", text)


@click.command(help=__doc__)
@click.option("--minutes", type=click.FloatRange(min=0.5), default=_MINUTES, show_default=True, help="Of disturbance.")
@click.option("--honest", type=click.IntRange(min=1), default=4, show_default=True, help="Honest clients at a time.")
@click.option("--kill-seconds", type=click.FloatRange(min=1), default=6.0, show_default=True, help="Between two kills.")
@click.option("--state", type=click.Path(path_type=Path), default=_STATE, help="State folder; its store keeps the model.")
@click.option("--records", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Tell these again; run nothing.")
@click.option("--print-only", is_flag=True, help="Leave docs/ alone.")
def main(minutes: float, honest: int, kill_seconds: float, state: Path, records: Path | None, print_only: bool) -> None:
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    if records is None:
        records = state / "soak.jsonl"
        run(Options(minutes * 60, honest, kill_seconds, records), state)
    found = read_records(records)
    click.echo(markdown(found))
    if not print_only and of(Began, found)[0].seconds >= _MINUTES * 60:
        _document(found)
    else:
        draw(found, records.with_suffix(".png"), f"{of(Began, found)[0].seconds / 60:g} minutes")
    sys.exit(0 if all(verdict.holds for verdict in verdicts(found)) else 1)


if __name__ == "__main__":
    main()
