"""Runs Lamina for a benchmark: `python -m knative run`, as a user does, or single gateways and stages as processes.

Stages have one replica each and stay up, so that no run is measured while a pod starts.
"""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from tokenizers import Tokenizer

from bench.report import ROOT
from eventing.wire.events import Cut
from functions.stage.engine.threads import usable_cores
from knative.commands.local_pipeline import LocalPipeline, Sharing, ensure_published, local_pipeline
from knative.commands.model_choice import packaged_model, published_name
from knative.commands.options import STORE_FOLDER
from knative.commands.state_folder import find_running
from knative.local.kubelet.containers import LocalData, read_container
from knative.render.services import gateway_service, stage_service
from knative.spec.pipeline_spec import PipelineSpec
from knative.spec.spec_file import load_spec, spec_from_dict
from storage.models.model_repository import read_file, read_manifest
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings

TOKEN: Final = "bench-pipeline-token"
NUM_STAGES: Final = 3
ALWAYS_ONE: Final[Mapping[str, Any]] = {"min_scale": 1, "max_scale": 1}  # `autoscaling` of a spec
_TOKEN_SECRET: Final = "bench-token"
_START_SECONDS: Final = 180.0
_STOP_SECONDS: Final = 20.0
_PORTS: Final = ("port", "function_port", "metrics_port")
_LISTENING: Final = re.compile(r"listening on port (\d+)")

T = TypeVar("T")


class DidNotStart(RuntimeError):
    """why: for a report, without this machine's paths."""

    def __init__(self, why: str, log: Path) -> None:
        super().__init__(f"{why}; {log} says more")
        self.why = why


@dataclass(frozen=True, slots=True)
class StageUrls:
    """The URLs of one stage."""

    proxy: str  # of its queue-proxy, which is `podIP:8012` on a cluster
    function: str
    metrics: str


@dataclass(frozen=True, slots=True)
class RunningPipeline:
    """A gateway and its stages on the local platform."""

    dtype: str
    url: str
    stages: tuple[StageUrls, ...]
    local: LocalPipeline
    store: StoreSettings
    pid: int  # of the platform, whose children the pods are

    @property
    def cut(self) -> Cut:
        return self.local.pipeline.cut

    @property
    def model(self) -> str:
        return self.local.pipeline.spec.model.name

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(read_file(ObjectStore(self.store), self.local.manifest, "tokenizer.json").decode())


@contextmanager
def running_pipeline(
    dtype: str, state: Path, model: str | None = None, stages: int = NUM_STAGES, kv_cache: str = "256Mi"
) -> Iterator[RunningPipeline]:
    """Starts everything and waits until it is ready. model: a source; None: the packaged one. Raises DidNotStart, which names
    the logs."""
    state.mkdir(parents=True, exist_ok=True)
    source = model or packaged_model()
    spec, secrets = _write_spec(source, dtype, stages, kv_cache, state)
    options = ["--spec", str(spec), "--secrets", str(secrets), "--model", source, "--dtype", dtype, "--port", "0"]
    with started([sys.executable, "-m", "knative", "run", *options, "--state", str(state)], state / "run.log") as run:
        running = wait_for(lambda: find_running(state), run, state / "run.log")
        assert running.store is not None
        pods = wait_for(lambda: _stages(running.admin_url, stages), run, state / "run.log")
        store = ObjectStore(running.store)
        manifest = read_manifest(store, published_name(source), dtype)
        local = local_pipeline(store, manifest, stages, load_spec(spec), {_TOKEN_SECRET: {"token": TOKEN}})
        yield RunningPipeline(dtype, running.gateway_url, pods, local, running.store, run.pid)


def local_spec(name: str, **fields: Any) -> PipelineSpec:
    """A spec for the local platform, which replaces image and store. fields: further ones as in YAML; others have defaults."""
    return spec_from_dict({"name": name, "image": "lamina:local", "store": {"endpoint": "http://embedded.invalid"}, **fields})


@contextmanager
def published_pipeline(spec: PipelineSpec, state: Path) -> Iterator[tuple[LocalPipeline, ObjectStore]]:
    """The spec's pipeline of the packaged model, which is published in a store below `state` unless it is there already."""
    state.mkdir(parents=True, exist_ok=True)
    with EmbeddedStore(state / STORE_FOLDER) as embedded:
        store = ObjectStore(embedded.settings)
        manifest = ensure_published(store, None, spec.model.dtype, Console())
        yield local_pipeline(store, manifest, spec.stages or 1, spec, {}), store


@asynccontextmanager
async def module_beside(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m` with these arguments, in a process that takes no time of this one's event loop. Terminated at the end."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", *arguments, cwd=ROOT)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _STOP_SECONDS)


@contextmanager
def gateway_beside(local: LocalPipeline, urls: Sequence[str], log: Path) -> Iterator[tuple[str, int]]:
    """Another gateway with the platform's settings that asks the stages at `urls`.

    Yields its URL and its process id. Raises DidNotStart.
    """
    services = {local.pipeline.stage_url(index): url for index, url in enumerate(urls)}
    with _function(gateway_service(local.pipeline), LocalData(local.secrets, {}, services, {}), log) as gateway:
        yield gateway


@contextmanager
def stage_alone(local: LocalPipeline, index: int, log: Path) -> Iterator[tuple[str, int]]:
    """A stage without queue-proxy and autoscaler. Yields its URL and its process id. Raises DidNotStart."""
    with _function(stage_service(local.pipeline, index), LocalData(local.secrets, {}, {}, {}), log) as stage:
        yield stage


@contextmanager
def _function(service: dict[str, Any], data: LocalData, log: Path) -> Iterator[tuple[str, int]]:
    """The process of a rendered Service's pod, once it is ready: its URL and its id."""
    told = dict(read_container(service["spec"]["template"], data, {}).environ)
    told.pop("LAMINA_KUBERNETES_API", None)  # Service URLs are the stages themselves.
    told |= {"PORT": "0", "LAMINA_LISTEN": "127.0.0.1", "LAMINA_METRICS_PORT": "0"}
    with started([sys.executable, "-m", "functions"], log, told) as process:
        url = wait_for(lambda: _listening_url(log), process, log)
        wait_for(lambda: succeeds(f"{url}/readyz"), process, log)
        yield url, process.pid


@contextmanager
def started(command: list[str], log: Path, environ: Mapping[str, str] | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """Runs a process, and ends it with SIGTERM, or with SIGKILL if that takes too long."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(look: Callable[[], T | None], process: "subprocess.Popen[bytes]", log: Path) -> T:
    """Polls `look` until it returns a value. Raises DidNotStart if `process` ends or takes too long."""
    deadline = time.monotonic() + _START_SECONDS
    while (found := look()) is None:
        if (code := process.poll()) is not None:
            how = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with exit code {code}"
            raise DidNotStart(f"{log.stem} ended {how}", log)
        if time.monotonic() > deadline:
            raise DidNotStart(f"{log.stem} did not come up within {_START_SECONDS:g} s", log)
        time.sleep(0.1)
    return found


def cpu_seconds(pids: tuple[int, ...]) -> float:
    """Processor time of these processes, their running descendants, and their ended children."""
    seconds = 0.0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    seconds += sum(process.cpu_times()[:4])
    return seconds


def read_metrics(url: str) -> dict[str, float]:
    """Sums of a function's metrics over their labels, by sample name."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(read_page(url)):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def read_page(url: str, timeout_seconds: float = 30.0) -> str:
    """A function's page of metrics. Raises OSError."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=timeout_seconds) as reply:
        page: str = reply.read().decode()
    return page


def _write_spec(source: str, dtype: str, stages: int, kv_cache: str, state: Path) -> tuple[Path, Path]:
    """Writes the spec and a folder of secrets, with the token that `bench.serving.round` needs, too."""
    cores = usable_cores()
    sharing = Sharing(cores, stages)
    spec = {
        "name": "bench",
        "model": {"name": published_name(source), "dtype": dtype},
        "stages": stages,
        "image": "lamina:local",
        "pipeline_token_secret": _TOKEN_SECRET,
        "stage": {
            "resources": {"cpu": str(cores), "memory": "12Gi"},
            "busy_threads": sharing.busy_threads,
            "kv_cache": kv_cache,
            "autoscaling": {**ALWAYS_ONE},
        },
        "gateway": {
            "micro_batch_sequences": sharing.micro_batch_sequences,
            "draft_tokens": 0,
            "prefix_sharing": "off",
            "stages_at_once": sharing.stages_at_once,
            "autoscaling": {"container_concurrency": 0, "target": 100, **ALWAYS_ONE},
        },
        "store": {"endpoint": "http://embedded.invalid"},
    }
    file, secret = state / "pipeline.yaml", state / "secrets" / _TOKEN_SECRET
    file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    secret.mkdir(parents=True, exist_ok=True)
    (secret / "token").write_text(TOKEN, encoding="utf-8")
    return file, secret.parent


def _stages(admin_url: str, count: int) -> tuple[StageUrls, ...] | None:
    """The stages in order; None: not each has a ready pod yet."""
    try:
        with urllib.request.urlopen(f"{admin_url}/status", timeout=30) as reply:
            services = {service["name"]: service for service in json.load(reply)["services"]}
    except OSError:
        return None
    stages = [service for name, service in sorted(services.items()) if re.search(r"-s\d+$", name)]
    pods = ([pod for revision in stage["revisions"] for pod in revision["pods"]] for stage in stages)
    found = [next((pod for pod in each if pod["phase"] == "ready"), None) for each in pods]
    ready = [pod for pod in found if pod is not None]
    if len(ready) < count:
        return None
    return tuple(StageUrls(*(f"http://127.0.0.1:{pod[port]}" for port in _PORTS)) for pod in ready)


def _listening_url(log: Path) -> str | None:
    found = _LISTENING.search(log.read_text(encoding="utf-8"))
    return f"http://127.0.0.1:{found[1]}" if found else None


def succeeds(url: str) -> bool | None:
    """True, or None: the reply is an error, or there is none."""
    with suppress(OSError), urllib.request.urlopen(url, timeout=30):
        return True
    return None
