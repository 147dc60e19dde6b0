"""Adapters through real processes and HTTP: answers of peft, token for token, while others compute and stages are killed."""

import asyncio
import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import openai
import pytest

from eventing.http.binding import to_binary_http
from eventing.wire.cloud_event import json_event
from eventing.wire.events import EventType
from eventing.wire.generation import GenerateRequest, GenerateResponse
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import services
from storage.models import adapter_publisher
from storage.models.adapter_publisher import delete_adapter, publish_adapter, set_share
from storage.models.adapters import read_version
from storage.store.object_store import ObjectStore
from tests.support.functions.functions import FunctionProcess, running_gateway, running_stages, wait_until
from tests.support.functions.killing import TIMING
from tests.support.functions.metrics import metric
from tests.support.functions.served import serving, stage_revisions, tiny_pipeline
from tests.support.knative.platform import until
from tests.support.storage.adapters import adapted, saved
from tests.support.storage.published import Published, until_end
from tests.support.storage.tiny_models import greedy

PROMPTS: Final = ("hello", "The capital of France is", "x" * 40)
NEW_TOKENS: Final = 12
NAMES: Final = tuple(f"a{number}" for number in range(6))
SALT: Final = "s" * 22
"""All share their prefixes."""
KEPT: Final = 2
"""Adapters that a stage keeps: fewer than are asked for at once."""


@dataclass(frozen=True)
class Adapted:
    published: Published
    store: ObjectStore
    versions: dict[str, str]
    expected: dict[tuple[str, str], list[int]]
    """By name of the adapter, empty for none, and prompt."""
    folders: Path


@pytest.fixture(scope="module")
def adapters(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    folders, store = tmp_path_factory.mktemp("adapters"), ObjectStore(published.store)
    versions: dict[str, str] = {}
    expected: dict[tuple[str, str], list[int]] = {}
    for number, name in enumerate(("", *NAMES)):
        model: Any = published.load_model().eval()
        model.generation_config.eos_token_id = None
        if name:
            model = adapted(model, number, r=(4, 16)[number % 2], use_rslora=number % 3 == 0)
            with pytest.MonkeyPatch.context() as patch:
                if number % 2:  # an object for each layer, in place of one for all stages
                    patch.setattr(adapter_publisher, "_OBJECT_BYTES", 1)
                versions[name] = publish_adapter(store, published.manifest.name, name, saved(model, folders / name)).version
        for prompt in PROMPTS:
            ids = published.tokenizer.encode(prompt).ids
            expected[name, prompt] = until_end(greedy(model, ids, NEW_TOKENS))
    assert len({tuple(tokens) for (_, prompt), tokens in expected.items() if prompt == PROMPTS[1]}) == len(NAMES) + 1
    return Adapted(published, store, versions, expected, folders)


@dataclass(frozen=True)
class Served:
    gateway: FunctionProcess
    stages: list[FunctionProcess]
    model: str

    def ask(self, adapter: str, prompt: str) -> tuple[int, Any]:
        """Status, and token ids or the problem."""
        model = f"{self.model}:{adapter}" if adapter else self.model
        request = GenerateRequest(prompt, model=model, max_tokens=NEW_TOKENS, cache_salt=SALT)
        headers, pieces = to_binary_http(json_event(EventType.GENERATE_REQUEST, "tests", request))
        asked = urllib.request.Request(self.gateway.url, b"".join(pieces), dict(headers))
        try:
            with urllib.request.urlopen(asked, timeout=120) as reply:
                return reply.status, list(msgspec.json.decode(reply.read(), type=GenerateResponse).token_ids)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


@contextmanager
def running_pipeline(published: Published, kept: int = KEPT) -> Iterator[Served]:
    more = {"LAMINA_ADAPTERS": str(kept)}
    with running_stages(published, **more) as stages, running_gateway(published, stages, **more) as gateway:
        yield Served(gateway, stages, published.manifest.name)


@pytest.fixture(scope="module")
def served(adapters: Adapted) -> Iterator[Served]:
    with running_pipeline(adapters.published) as served:
        yield served


def test_answers_are_those_of_peft_whatever_else_is_asked(adapters: Adapted, served: Served) -> None:
    """More adapters at once than a stage keeps: some wait, and some are loaded again. Prefix caches keep them apart."""
    asked = [(name, prompt) for _ in range(3) for prompt in PROMPTS for name in ("", *NAMES)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda each: served.ask(*each), asked))
    assert answers == [(200, adapters.expected[each]) for each in asked]
    for stage in served.stages:
        assert metric(stage, "lamina_stage_adapters") <= KEPT
        assert metric(stage, "lamina_stage_adapter_bytes") > 0
        assert metric(stage, "lamina_stage_adapter_loads_total") >= len(NAMES)
    page = served.gateway.get("/metrics")[1]
    assert all(f'gen_ai_request_model="{served.model}:{name}"' in page for name in NAMES)


def test_models_and_adapters_are_listed_and_unknown_ones_are_refused(served: Served) -> None:
    status, listed = served.gateway.get("/v1/models")
    assert status == 200
    ids = [each["id"] for each in listed["data"]]
    assert ids[0] == served.model
    assert {f"{served.model}:{name}" for name in NAMES} <= set(ids)
    assert served.gateway.get(f"/v1/models/{ids[-1]}")[1]["parent"] == served.model
    status, problem = served.ask("no-such", "hello")
    assert (status, problem["type"]) == (404, "urn:lamina:problem:model-not-found")
    client = openai.OpenAI(base_url=f"{served.gateway.url}/v1", api_key="any", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="no adapter 'no-such'") as refused:
        client.completions.create(model=f"{served.model}:no-such", prompt="hello")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    answer = client.completions.create(model=ids[-1], prompt="hello", max_tokens=4, temperature=0)
    assert answer.model == ids[-1]


def test_a_new_version_is_taken_by_new_requests_and_taken_back(adapters: Adapted, served: Served) -> None:
    """Within the time for which a gateway uses what it has read. A version can be asked for by its digits."""
    store, model = adapters.store, served.model
    old = publish_adapter(store, model, "changing", adapters.folders / NAMES[0]).version
    prompt = PROMPTS[1]
    wait_until(lambda: served.ask("changing", prompt) == (200, adapters.expected[NAMES[0], prompt]))
    new = publish_adapter(store, model, "changing", adapters.folders / NAMES[1]).version
    wait_until(lambda: served.ask("changing", prompt) == (200, adapters.expected[NAMES[1], prompt]))
    assert served.ask(f"changing@{old}", prompt) == (200, adapters.expected[NAMES[0], prompt])
    set_share(store, model, "changing", old, 100)
    wait_until(lambda: served.ask("changing", prompt) == (200, adapters.expected[NAMES[0], prompt]))
    assert served.ask(f"changing@{new[:6]}", prompt) == (200, adapters.expected[NAMES[1], prompt])
    delete_adapter(store, model, "changing")
    wait_until(lambda: served.ask("changing", prompt)[0] == 404)


@pytest.mark.parametrize("damage", ["missing", "altered", "of too large a rank"])
def test_an_adapter_that_cannot_be_loaded_fails_its_own_sequences(damage: str, adapters: Adapted, served: Served) -> None:
    store, model, folder = adapters.store, served.model, adapters.folders / damage
    rank = 17 if damage.endswith("rank") else 8
    saved(adapted(adapters.published.load_model(), 70 + len(damage), r=rank), folder)
    name = damage.replace(" ", "-")
    version = publish_adapter(store, model, name, folder).version
    stored = read_version(store, model, version).objects["from-00000"]
    if damage == "missing":
        store.delete(stored.key)
    elif damage == "altered":
        data = bytearray(store.get(stored.key))
        data[-70] ^= 1
        store.put(stored.key, bytes(data))
    wait_until(lambda: served.ask(name, PROMPTS[0])[0] != 404)
    with ThreadPoolExecutor(4) as threads:
        failing = [threads.submit(served.ask, name, PROMPTS[0]) for _ in range(2)]
        others = [threads.submit(served.ask, other, PROMPTS[0]) for other in ("", NAMES[2])]
    for each in failing:
        status, problem = each.result()
        assert (status, problem["type"]) == (500, "urn:lamina:problem:adapter-unusable"), problem
        assert version in problem["detail"]
    assert [each.result() for each in others] == [(200, adapters.expected[other, PROMPTS[0]]) for other in ("", NAMES[2])]
    delete_adapter(store, model, name)


def test_a_pipeline_without_adapters_serves_its_model_alone(adapters: Adapted) -> None:
    with running_pipeline(adapters.published, kept=0) as served:
        assert [each["id"] for each in served.gateway.get("/v1/models")[1]["data"]] == [served.model]
        assert served.ask(NAMES[0], PROMPTS[0])[0] == 404
        assert served.ask("", PROMPTS[0]) == (200, adapters.expected["", PROMPTS[0]])


@pytest.mark.slow
def test_a_stage_that_is_killed_loads_adapters_again(adapters: Adapted, tmp_path: Path) -> None:
    """In the pipeline that a spec renders. Each stage is killed once while all adapters are asked for."""
    published = adapters.published
    plain = tiny_pipeline(published)
    spec = msgspec.structs.replace(plain.spec, adapters=len(NAMES))
    pipeline = ResolvedPipeline(spec, plain.cut, published.manifest.digest)
    asked = [(name, prompt) for prompt in PROMPTS for name in ("", *NAMES)]

    async def ask(session: aiohttp.ClientSession, url: str, name: str, prompt: str) -> list[int]:
        model = f"{published.manifest.name}:{name}" if name else None
        request = GenerateRequest(prompt, model=model, max_tokens=NEW_TOKENS)
        headers, pieces = to_binary_http(json_event(EventType.GENERATE_REQUEST, "tests", request))
        async with session.post(url, data=b"".join(pieces), headers=headers) as reply:
            body = await reply.read()
            assert reply.status == 200, body.decode()
            return list(msgspec.json.decode(body, type=GenerateResponse).token_ids)

    async def scenario() -> None:
        expected = [adapters.expected[each] for each in asked]
        async with serving(tmp_path, published, services(pipeline), TIMING) as platform, aiohttp.ClientSession() as session:
            url = platform.url("tiny")
            for (revision,) in stage_revisions(platform, pipeline):
                answers = asyncio.gather(*(ask(session, url, *each) for each in asked))
                await until(lambda revision=revision: bool(revision.ready_pods), 120)
                (pod, *_) = revision.ready_pods
                os.kill(pod.pid, signal.SIGKILL)
                assert await answers == expected
                await until(lambda pod=pod: pod.restarts > 0, 120)

    asyncio.run(scenario())
