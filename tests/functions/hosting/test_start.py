"""Start, failure and end of functions, and what each role imports."""

import json
import signal
import socket
import subprocess
import sys
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from eventing.http.binding import from_http, to_binary_http
from eventing.http.delivery import Sender
from eventing.problems import NotReady
from eventing.wire.batch_codec import encode_batch
from eventing.wire.cloud_event import batch_data, json_data, json_event, make_event
from eventing.wire.control import WarmupReply, WarmupRequest
from eventing.wire.events import BATCH_CONTENT_TYPE, Batch, EventType, Row, Status
from functions.stage.engine.threads import WAITING, PassThreads, set_openmp, thread_count
from knative.local.kubelet.processes import free_port
from storage.store.object_store import ObjectStore
from tests.support.environments import GATEWAY
from tests.support.functions.functions import ROOT, TOKEN, FunctionProcess, gateway_environment, stage_environment, wait_until
from tests.support.storage.published import CUT, Published, published_model

AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def sender() -> Iterator[Sender]:
    with closing(Sender()) as sender:
        yield sender


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"LAMINA_PIPELINE": "0123456789abcdef0123456789abcdef"},
            ("0123456789abcdef0123456789abcdef", "{fingerprint}", "render"),
        ),
        ({"LAMINA_CUT": "0:2,2:4,4:5"}, ("6 layers", "ends at 5")),
        ({"LAMINA_MODEL": "large"}, ("'large'", "float32", "publish")),
        ({"LAMINA_STORE_BUCKET": "nothing"}, ("'nothing'",)),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, ("bucket", "key")),
    ],
    ids=["pipeline", "cut", "model", "bucket", "keys"],
)
@pytest.mark.parametrize("role", ["stage", "gateway"])
def test_a_wrong_publication_or_store_is_named(
    published: Published, role: str, changes: dict[str, str], words: tuple[str, ...]
) -> None:
    cut = ((0, 2), (2, 4), (4, 5)) if "LAMINA_CUT" in changes else ((0, 2), (2, 4), (4, 6))
    urls = ["http://127.0.0.1:9"] * 3
    environ = stage_environment(published, 1, cut) if role == "stage" else gateway_environment(published, urls, cut)
    with FunctionProcess(environ | changes) as function:
        assert function.wait_end() == 1
    (error,) = (line for line in function.log.splitlines() if "ERROR" in line)
    assert "cannot start" in error
    assert all(word.format(fingerprint=published.fingerprint()) in error for word in words), error
    assert "Traceback" not in function.log


@pytest.mark.slow
def test_altered_weights_are_never_served(tmp_path: Path) -> None:
    with published_model(tmp_path) as published:
        stored = published.manifest.objects["layer-00003"]
        store = ObjectStore(published.store)
        data = bytearray(store.get(stored.key))
        data[-1] ^= 1
        store.put(stored.key, bytes(data))
        with FunctionProcess(stage_environment(published, 1)) as stage:
            assert stage.wait_end() == 1
        assert stored.key in stage.log or "layer-00003" in stage.log


def test_a_model_that_cannot_be_run_is_named(published: Published) -> None:
    with FunctionProcess(stage_environment(published, 1, LAMINA_KV_CACHE_BYTES="1")) as stage:
        assert stage.wait_end() == 1
    assert "layers 2:4 of tiny in float32" in stage.log
    assert "Traceback" not in stage.log


def test_weights_come_out_of_the_cache_on_the_next_start(published: Published, tmp_path: Path) -> None:
    environ = stage_environment(published, 1, LAMINA_WEIGHTS_CACHE=str(tmp_path / "cache"))
    with FunctionProcess(environ) as stage:
        stage.wait_ready()
    with FunctionProcess(environ) as stage:
        stage.wait_ready()
        assert stage.get("/readyz")[1]["start_up"].keys() >= {"first_byte", "last_byte"}
        total = sum(published.manifest.objects[f"layer-0000{layer}"].bytes for layer in (2, 3))
        assert f"lamina_stage_loaded_bytes {total:.1f}" in stage.get("/metrics")[1]
    assert any((tmp_path / "cache").rglob("*"))


def test_a_port_in_use_is_named(published: Published) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        with FunctionProcess(stage_environment(published, 0, PORT=str(port))) as stage:
            assert stage.wait_end() == 1
    assert f"cannot listen on port {port}" in stage.log


@pytest.mark.slow
def test_a_starting_stage_is_alive_and_not_ready_and_can_be_stopped(published: Published, sender: Sender) -> None:
    """Its store does not answer: it goes on trying, and answers waiting events when it is stopped."""
    silent = {"LAMINA_STORE_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    with FunctionProcess(stage_environment(published, 0) | silent) as stage:
        assert stage.get("/healthz")[0] == 200
        assert stage.get("/readyz")[0] == 503
        event = make_event(EventType.FORWARD, "/test", b"", BATCH_CONTENT_TYPE, pipeline=published.fingerprint(), layer="0")
        headers, body = to_binary_http(event)
        with pytest.raises(NotReady, match="is starting"):
            sender.send(stage.url, headers | AUTHORIZED, body, 10)
        with ThreadPoolExecutor() as executor:
            event = json_event(EventType.WARMUP, "/test", WarmupRequest(), pipeline=published.fingerprint())
            headers, body = to_binary_http(event)
            waiting = executor.submit(sender.send, stage.url, headers | AUTHORIZED, body, 60)
            wait_until(lambda: "lamina_stage_events_in_flight 1.0" in stage.get("/metrics")[1])
            assert stage.stop() == 0
            with pytest.raises(NotReady, match="told to stop"):
                waiting.result()


@pytest.mark.slow
@pytest.mark.parametrize("expirytime", [None, "9999-12-31T23:59:59Z"])
def test_a_warm_up_event_waits_for_the_weights(published: Published, sender: Sender, expirytime: str | None) -> None:
    """Also with an expiry in the year 9999, which is longer than a lock can wait."""
    with FunctionProcess(stage_environment(published, 2)) as stage:
        attributes = {"pipeline": published.fingerprint(), "expirytime": expirytime}
        event = json_event(EventType.WARMUP, "/test", WarmupRequest(), **attributes)
        headers, body = to_binary_http(event)
        reply = sender.send(stage.url, headers | AUTHORIZED, body, 60)
        warm = json_data(from_http(reply.headers, reply.body), WarmupReply)
        assert warm.start_up["warm_up"] > warm.start_up["process"]
        assert stage.get("/readyz")[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_finishes_requests_in_hand_after_a_signal(published: Published, sender: Sender, number: signal.Signals) -> None:
    sleeping = {"LAMINA_LAYER_GROUP": "sleep", "LAMINA_SLEEP_SECONDS": "1"}
    row = Row("slow", 0, 0, 1, reserve_tokens=8)
    body = encode_batch(Batch((row,), memoryview(array("i", [5]))))
    event = make_event(EventType.FORWARD, "/test", body, BATCH_CONTENT_TYPE, pipeline=published.fingerprint(), layer="0")
    headers, pieces = to_binary_http(event)
    with FunctionProcess(stage_environment(published, 0) | sleeping) as stage, ThreadPoolExecutor() as executor:
        stage.wait_ready()
        answer = executor.submit(sender.send, stage.url, headers | AUTHORIZED, pieces, 30)
        wait_until(lambda: "lamina_stage_sequences 1.0" in stage.get("/metrics")[1])
        stage.process.send_signal(number)
        reply = answer.result()
        (answered,) = batch_data(from_http(reply.headers, reply.body)).rows
        assert answered.status is Status.OK
        assert stage.wait_end(30) == 0


IMPORTS_OF_A_STAGE = """
import json, os, sys
from functions.configuration.config import read_config
from functions.__main__ import _function
from functions.hosting.server import Server
from functions.stage.serving.arriving import ArrivingModel
from functions.stage.serving.bring_up import bring_up
from functions.hosting.startup import StartUp
from functions.stage.serving.app import StageMetrics
config = read_config(os.environ)
start_up = StartUp()
_function(config, start_up, os.environ)
bring_up(config, ArrivingModel(config, start_up), start_up, StageMetrics())
print(json.dumps(sorted(sys.modules)))
"""
IMPORTS_OF_A_GATEWAY = """
import json, os, sys, time
from functions.configuration.config import read_config
from functions.__main__ import _function
from functions.hosting.server import Server
from functions.hosting.startup import StartUp
_function(read_config(os.environ), StartUp(), os.environ)
print(json.dumps([*sorted(sys.modules), time.process_time()]))
"""
NEVER = {"transformers", "boto3", "botocore", "kubernetes", "aiohttp", "requests", "rich", "pytest", "yaml", "gguf"}


def imported(code: str, environ: dict[str, str]) -> list[str]:
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr
    modules: list[str] = json.loads(ended.stdout)
    return modules


OF_A_NATIVE_STAGE = {
    *("functions", "eventing", "storage"),
    *("numpy", "httptools"),
    *("cloudevents", "dateutil", "six", "msgspec", "prometheus_client", "blake3", "xxhash", "tenacity", "typing_extensions"),
    "cython_runtime",  # of numpy.random
}
"""Packages that it may import: Lamina, arrays, HTTP, events and digests."""


@pytest.mark.parametrize("stage", range(len(CUT)))
def test_a_native_stage_imports_neither_torch_nor_transformers(published: Published, stage: int) -> None:
    packages = {module.split(".")[0] for module in imported(IMPORTS_OF_A_STAGE, stage_environment(published, stage))}
    packages = {package for package in packages - sys.stdlib_module_names if not package.startswith("_")}
    assert packages <= OF_A_NATIVE_STAGE
    assert "numpy" in packages


@pytest.mark.slow
def test_a_stage_by_torchs_operators_imports_little_more_than_torch(published: Published) -> None:
    modules = imported(IMPORTS_OF_A_STAGE, stage_environment(published, 1, LAMINA_LAYER_GROUP="llama"))
    assert "torch" in modules
    assert not NEVER.intersection(modules)


def test_a_gateway_imports_no_torch_and_starts_at_once() -> None:
    *modules, cpu_seconds = imported(IMPORTS_OF_A_GATEWAY, GATEWAY)
    assert not (NEVER | {"torch", "numpy", "safetensors"}).intersection(modules)
    # CPU time rather than the clock's, which other processes of a busy machine are in.
    assert float(cpu_seconds) < 1.0


FIRST = {
    "stage": "functions.stage.serving.arriving.ArrivingModel.__init__",
    "gateway": "functions.gateway.scheduling.scheduler.Scheduler.wake",
}
"""What each role does first."""


@pytest.mark.parametrize("role", FIRST)
def test_what_others_wait_for_begins_before_most_is_imported(published: Published, role: str) -> None:
    """A gateway wakes the stages, a stage reads its weights, and then they import their servers, APIs and layers."""
    owner, _, method = FIRST[role].rpartition(".")
    code = f"""
import json, os, pkgutil, sys
from functions.configuration.config import read_config
from functions.__main__ import _function
from functions.hosting.startup import StartUp
config, before = read_config(os.environ), []
owner = pkgutil.resolve_name("{owner}")
def first(self, *_):
    before.extend(sys.modules)
    print(json.dumps(before), flush=True)
    os._exit(0)
owner.{method} = first
_function(config, StartUp(), os.environ)
"""
    environ = stage_environment(published, 0) if role == "stage" else GATEWAY
    modules = set(imported(code, environ))
    assert f"functions.{role}.app" not in modules
    assert not modules & {"flask", "jinja2", "tokenizers", "numpy", "functions.hosting.server"}


@pytest.mark.parametrize(
    "role_module",
    ["functions.__main__", "functions.hosting.server", "functions.stage.serving.function", "functions.stage.serving.app"],
)
def test_importing_does_nothing(role_module: str) -> None:
    """No thread, no signal handler, no logging, no torch."""
    code = f"""
import logging, signal, sys, threading, json
before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
import {role_module}
assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
assert threading.active_count() == 1
assert not logging.getLogger().handlers
print(json.dumps(sorted(sys.modules)))
"""
    assert "torch" not in imported(code, {})


def test_threads_follow_the_configuration_and_wait_without_spinning() -> None:
    environ: dict[str, str] = {}
    set_openmp(environ, thread_count(3))
    assert environ == {"OMP_NUM_THREADS": "3", **WAITING}
    assert thread_count(0) >= 1


def test_a_busy_stage_keeps_to_its_share_of_the_cores_and_a_mostly_idle_one_takes_all() -> None:
    threads, moment = PassThreads(4, 1), 0.0
    seen = []
    for pause in (2.0, 2.0, 2.0, 0.1, 0.1, 2.0, 2.0, 2.0, 2.0):
        moment += pause
        seen.append(threads.begin(moment))
        threads.end(moment, moment + 1.0)
        moment += 1.0
    assert seen[:5] == [4, 4, 4, 4, 1]
    assert seen[-1] == 4
    assert PassThreads(3, 0).begin(0.0) == 3
