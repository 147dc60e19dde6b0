"""`python -m knative run`: a pipeline of functions on this machine answers one question, then serves."""

import asyncio
import logging
import shlex
import signal
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from eventing.claim_check import sweep
from knative.commands.ask import AskFailed, Question, chat_option, is_question, show_answer
from knative.commands.local_fleet import LocalFleet
from knative.commands.local_pipeline import LocalPipeline, ensure_published, kept_kv_key, local_pipeline
from knative.commands.local_pods import show_stages, watch_starts
from knative.commands.options import FILE, FOLDER, STORE_FOLDER, state_option, tokenizer_option
from knative.commands.state_folder import RunningPlatform, StateFolder, naming_a_full_disk
from knative.local.kubelet.containers import NamedData, data_folders, read_data_folder
from knative.local.platform import Platform, PlatformOptions, running_platform
from knative.render.eventing import eventing_objects
from knative.render.services import services
from knative.spec.fleet_spec import FleetSpec, is_fleet
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.pipeline_spec import DTYPES, KEYS_ENTRY, KV_PREFIX, PipelineSpec
from knative.spec.spec_file import load_spec
from storage.kv.kv_store import Retention, prune
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from storage.store.payload_store import PayloadStore
from storage.store.settings import StoreSettings

_CACHE_FOLDER: Final = "weights"
_KV_RETENTION: Final = Retention(10 * 2**30, timedelta(days=7))
_STOP_SECONDS: Final = 3.0  # how long pods may finish their work when the run ends


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    spec: Path | None
    model: str | None
    stages: int
    dtype: str | None
    tokenizer: Path | None
    port: int
    prompt: str
    max_tokens: int
    chat: bool | None
    once: bool
    secrets: Path | None
    config_maps: Path | None
    state: Path


@click.command(short_help="Run a pipeline on this machine, ask a question, serve.")
@click.option(
    "--spec",
    type=FILE,
    help="A PipelineSpec or a Fleet instead of --stages …",
)
@click.option("--model", help="A folder, GGUF file, hub id or published name. Default: the packaged SmolLM2-135M-Instruct.")
@click.option("--stages", type=click.IntRange(min=1), default=3, show_default=True, help="Number of groups of layers.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Default: the smallest that loses nothing the model has (docs/trying.md)."
)
@tokenizer_option
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Of the gateway; 0: any free one.")
@click.option("--prompt", default="What is the capital of France?", show_default=True, help="The first question.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@chat_option
@click.option("--once", is_flag=True, help="End after the answer.")
@click.option("--secrets", type=FOLDER, help="Secrets that the spec names: a folder for each, a file for each key.")
@click.option("--config-maps", type=FOLDER, help="Config maps, likewise.")
@state_option
def run(**options: Any) -> None:
    """Run a pipeline on this machine: publish the model, start at zero, ask one question, show the stages, then serve.

    Ctrl-C ends it and every process it started.

    \b
    python -m knative run
    python -m knative run --once --prompt "The capital of France is" --max-tokens 8
    python -m knative run --model ./my-model --stages 5 --dtype float32 --port 9000
    python -m knative run --spec examples/smollm2-cpu/pipeline.yaml
    """
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    # Before the event loop runs, both close everything. Python leaves SIGINT ignored if a shell started it in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    chosen, console = RunOptions(**options), Console()
    with StateFolder(chosen.state) as state:
        if state.recovered:
            console.out(f"an earlier run in {state.path} ended without cleaning up; its leftovers are removed", highlight=False)
        with EmbeddedStore(chosen.state / STORE_FOLDER) as embedded:
            store = ObjectStore(embedded.settings)
            sweep(store, datetime.now(UTC))  # deletes payloads of events that expired
            with PayloadStore(embedded.settings) as objects:
                prune(objects, KV_PREFIX, _KV_RETENTION, datetime.now(UTC))  # deletes old KV of idle conversations
            with naming_a_full_disk(state.path):
                named, cache, kv_key = read_data_folder(chosen.secrets), chosen.state / _CACHE_FOLDER, kept_kv_key(chosen.state)
                if chosen.spec is not None and is_fleet(chosen.spec):
                    running: _Run = _FleetRun(chosen, LocalFleet(chosen.spec, store, named, cache, kv_key, console))
                else:
                    spec = load_spec(chosen.spec) if chosen.spec else None
                    wanted = (spec.model.name, spec.model.dtype) if spec and not chosen.model else (chosen.model, chosen.dtype)
                    manifest = ensure_published(store, *wanted, console, chosen.tokenizer)
                    local = local_pipeline(store, manifest, chosen.stages, spec, named, cache, kv_key)
                    running = _PipelineRun(chosen, local)
            asyncio.run(running.run(state, store.settings))


class _Run:
    """The part of `run` that needs an event loop.

    It starts the platform, asks one question, and serves until a signal stops it. Subclasses know what runs.
    """

    def __init__(
        self, chosen: RunOptions, spec: PipelineSpec | FleetSpec, objects: list[KubernetesObject], secrets: NamedData
    ) -> None:
        self._options = chosen
        self._spec = spec
        self._objects = objects
        self._secrets = secrets
        self._console = Console()
        self._stop = asyncio.Event()

    def _announce(self, platform: Platform, url: str) -> None:
        raise NotImplementedError

    async def _first_answer(self, platform: Platform, url: str) -> None:
        raise NotImplementedError

    async def _serve(self, platform: Platform) -> None:
        """Runs until a signal stops the run."""
        await self._stop.wait()

    async def run(self, state: StateFolder, store: StoreSettings) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        options = PlatformOptions(
            ports={self._spec.name: self._options.port},
            secrets=self._secrets,
            secret_folders=data_folders(self._options.secrets),
            config_maps=read_data_folder(self._options.config_maps),
            logs=state.logs,
        )
        async with running_platform(options, self._objects, _STOP_SECONDS) as platform:
            url = platform.url(self._spec.name, self._spec.namespace)
            state.publish(RunningPlatform(platform.status()["pid"], platform.admin_url, url, store))
            self._announce(platform, url)
            if self._spec.eventing is not None:
                self._say(f"events go to the broker {platform.eventing.broker_url(self._spec.name, self._spec.namespace)}")
            if not await self._until_stopped(self._first_answer(platform, url)) or self._options.once:
                return
            self._say(f"serving on {url} until Ctrl-C; python -m knative status shows what runs")
            await self._serve(platform)

    async def _until_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Runs `work` to its end, or cancels it when a signal stops the run. Returns False if it was cancelled.

        Raises what `work` raises.
        """
        task, stopped = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if task.done():
            await task
            return True
        task.cancel()
        await asyncio.wait([task])
        return False

    def _say(self, text: str) -> None:
        self._console.out(text, highlight=False)


class _PipelineRun(_Run):
    """Runs one pipeline, and shows its stages after the first answer."""

    def __init__(self, chosen: RunOptions, local: LocalPipeline) -> None:
        objects = [*services(local.pipeline), *eventing_objects(local.pipeline)]
        super().__init__(chosen, local.pipeline.spec, objects, local.secrets)
        self._local = local

    def _announce(self, platform: Platform, url: str) -> None:
        spec, shape, stages = self._local.pipeline.spec, self._local.shape, len(self._local.pipeline.cut)
        if spec.gateway.page != "off":
            self._say(f"{url}/ in a browser: chat, and the pipeline alive")
        self._say(f"{shape.name} as {shape.dtype} in {stages} stages, all at zero; gateway {url}")
        if self._local.api_key is not None:
            self._say(f"the gateway requires a key: Authorization: Bearer {self._local.api_key}")
        for name in spec.gateway.api_keys_secrets:
            file = platform.secret_folders[name] / KEYS_ENTRY
            self._say(f"make, list and revoke keys while it runs: python -m knative keys {file}")

    async def _first_answer(self, platform: Platform, url: str) -> None:
        """Asks the first question and shows the stages. Says why not if the gateway wants a key that is not known here.

        Raises AskFailed; also for such a key if the answer is all that was wanted (--once).
        """
        options, chat = self._options, self._options.chat
        if self._local.pipeline.spec.gateway.api_keys_secrets and self._local.api_key is None:
            unknown = "cannot ask the first question: the gateway wants an API key, and its Secret has none but hashes"
            if options.once:
                raise AskFailed(f"{unknown}; leave out --once and ask with python -m knative ask --api-key")
            self._say(
                f"{unknown}; ask with a key of yours: python -m knative ask --api-key … {url} {shlex.quote(options.prompt)}"
            )
            return
        self._say(f"> {options.prompt}")
        if chat is None:
            chat = "chat_template.jinja" in self._local.manifest.files and is_question(options.prompt)
        question = Question(options.prompt, options.max_tokens, chat=chat, api_key=self._local.api_key)
        watch = asyncio.create_task(watch_starts(platform.status, lambda text: self._say(f"  {text}")))
        answer = asyncio.create_task(show_answer(self._console, url, question, before_text=watch.cancel))
        try:
            await asyncio.wait((watch, answer), return_when=asyncio.FIRST_COMPLETED)
            if watch.done() and not watch.cancelled():
                await watch  # raises PodsFailed
            await answer
        finally:
            for task in (watch, answer):
                task.cancel()
            await asyncio.gather(watch, answer, return_exceptions=True)
        await show_stages(self._console, self._local.pipeline, self._local.shape, platform.status())


class _FleetRun(_Run):
    """Runs a fleet, and follows the files that describe it."""

    def __init__(self, chosen: RunOptions, local: LocalFleet) -> None:
        super().__init__(chosen, local.fleet, local.objects, local.secrets)
        self._local = local

    def _announce(self, platform: Platform, url: str) -> None:
        if self._local.fleet.gateway.page != "off":
            self._say(f"{url}/ in a browser: chat, and the fleet alive")
        self._say(f"{len(self._local.models)} models at {url}, all at zero")
        for name in self._local.fleet.gateway.api_keys_secrets:
            self._say(f"each member requires a key of its own: {platform.secret_folders[name]} has them")

    async def _first_answer(self, platform: Platform, url: str) -> None:
        model, options = self._local.models[0], self._options
        self._say(f"{model} > {options.prompt}")
        question = Question(
            options.prompt, options.max_tokens, chat=options.chat or False, api_key=self._local.api_key(), model=model
        )
        await show_answer(self._console, url, question)

    async def _serve(self, platform: Platform) -> None:
        following = asyncio.create_task(self._local.follow(platform, self._say))
        try:
            await self._stop.wait()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
