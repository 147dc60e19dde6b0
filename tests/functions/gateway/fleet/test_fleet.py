"""A fleet's gateway as a process, before the stages of two models, and an API that lists and watches its members."""

import asyncio
import base64
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from cloudevents.core.v1.event import CloudEvent

from eventing.http.binding import to_structured_http
from eventing.wire.cloud_event import json_data, json_event, make_event
from eventing.wire.events import Attribute, Cut, EventType
from eventing.wire.framing import JSONL_CONTENT_TYPE
from eventing.wire.generation import GenerateRequest, GenerateResponse
from knative.local.eventing.local_eventing import LocalEventing
from knative.render.eventing import eventing_objects
from knative.render.fleet import fleet_door
from tests.support.functions.functions import (
    FunctionProcess,
    common_environment,
    gateway_environment,
    running,
    stage_environment,
    wait_until,
)
from tests.support.functions.metrics import metric
from tests.support.knative.event_sink import event_sink, post
from tests.support.knative.kubernetes_watch import WatchServer
from tests.support.knative.manifests import fleet_of
from tests.support.knative.platform import client, until
from tests.support.storage.published import CUT, Published, published_model

WHOLE: Cut = ((0, 6),)
_OF_PROCESS = ("PORT", "PATH", "LAMINA_LISTEN", "LAMINA_METRICS_PORT", "LAMINA_PIPELINE_TOKEN", "LAMINA_STORE", "AWS_")


@dataclass(frozen=True)
class Pipeline:
    """A model with running stages."""

    name: str
    model: Published
    cut: Cut
    urls: list[str]

    @property
    def services(self) -> list[str]:
        return [f"{self.name}-s{number}" for number in range(len(self.cut))]

    def member(self, name: str = "", percent: int | None = None, **more: str) -> dict[str, Any]:
        """Its ConfigMap. name: instead of its own."""
        environ = gateway_environment(self.model, self.urls, self.cut, LAMINA_STAGE_SERVICES=",".join(self.services), **more)
        data = {key: value for key, value in environ.items() if not key.startswith((*_OF_PROCESS, "LAMINA_ROLE"))}
        labels = {"lamina.dev/fleet": "models", "app.kubernetes.io/instance": self.name}
        metadata: dict[str, Any] = {"name": name or self.name, "labels": labels}
        if percent is not None:
            metadata["annotations"] = {"lamina.dev/percent": str(percent)}
        return {"kind": "ConfigMap", "metadata": metadata, "data": data}

    def slices(self) -> Iterator[dict[str, Any]]:
        for service, url in zip(self.services, self.urls, strict=True):
            labels = {"serving.knative.dev/service": service, "networking.internal.knative.dev/serviceType": "Private"}
            yield {
                "kind": "EndpointSlice",
                "metadata": {"name": service, "labels": labels},
                "ports": [{"name": "http", "port": urlsplit(url).port}],
                "endpoints": [{"addresses": ["127.0.0.1"], "conditions": {"ready": True}}],
            }


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pipeline, Pipeline]]:
    """The same weights as models `tiny`, in three stages, and `other`, in one."""
    folder = tmp_path_factory.mktemp("fleet")
    with published_model(folder / "tiny") as tiny, published_model(folder / "other", name="other", store=tiny.store) as other:
        environments = [stage_environment(tiny, group) for group in range(len(CUT))] + [stage_environment(other, 0, WHOLE)]
        with running(environments) as stages:
            urls = [stage.url for stage in stages]
            yield Pipeline("tiny", tiny, CUT, urls[:-1]), Pipeline("other", other, WHOLE, urls[-1:])


@contextmanager
def fleet(
    pipelines: tuple[Pipeline, Pipeline], *members: dict[str, Any], **more: str
) -> Iterator[tuple[FunctionProcess, WatchServer]]:
    with WatchServer() as api:
        for pipeline in pipelines:
            for each in pipeline.slices():
                api.put(each)
        for member in members or [pipeline.member() for pipeline in pipelines]:
            api.put(member)
        common = common_environment(pipelines[0].model).items()
        environ = {key: value for key, value in common if key.startswith(_OF_PROCESS)}
        own = {
            "LAMINA_ROLE": "fleet",
            "LAMINA_FLEET": "models",
            "LAMINA_KUBERNETES_API": api.url,
            "LAMINA_POD_NETWORK": "127.0.0.0/8",
            "LAMINA_POD_PORT": "0",
        }
        with FunctionProcess(environ | own | more) as process:
            yield process.wait_ready(), api


def ask(process: FunctionProcess, model: str | None, key: str = "", path: str = "/v1/completions") -> tuple[int, Any]:
    """Status and document of the answer to a short prompt."""
    body = {"prompt": "hello", "max_tokens": 6, "temperature": 0} | ({} if model is None else {"model": model})
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(process.url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def models(process: FunctionProcess, key: str = "") -> list[str]:
    request = urllib.request.Request(f"{process.url}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return [each["id"] for each in json.load(reply)["data"]]


def answered(process: FunctionProcess, model: str) -> Any:
    """An answer's JSON. A busy machine loads a member's part slowly: the gateway then says 503, and is asked again."""
    replies: list[Any] = []

    def asked() -> bool:
        status, reply = ask(process, model)
        replies.append(reply)
        return status == 200

    wait_until(asked)
    return replies[-1]


def overview(process: FunctionProcess, key: str = "") -> dict[str, Any]:
    """The first event of `GET /v1/fleet/events`."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with urllib.request.urlopen(
        urllib.request.Request(f"{process.url}/v1/fleet/events", headers=headers), timeout=60
    ) as stream:
        data = next(line for line in stream if line.startswith(b"data: "))
    state: dict[str, Any] = json.loads(data.removeprefix(b"data: "))
    return state


def states(process: FunctionProcess, key: str = "") -> dict[str, str]:
    return {name: each["state"] for name, each in overview(process, key)["members"].items()}


def text_of(pipeline: Pipeline) -> str:
    return pipeline.model.tokenizer.decode(pipeline.model.expected("hello", 6))


def test_each_model_is_answered_by_its_own_pipeline(pipelines: tuple[Pipeline, Pipeline]) -> None:
    with fleet(pipelines) as (process, api):
        assert models(process) == ["other", "tiny"]
        assert process.get("/readyz")[1]["members"] == {"asleep": 2, "loading": 0, "loaded": 0, "failed": 0}
        for pipeline in pipelines:
            reply = answered(process, pipeline.name)
            assert reply["model"] == pipeline.name
            assert reply["choices"][0]["text"] == text_of(pipeline)
            assert reply["system_fingerprint"] == pipeline.model.fingerprint(pipeline.cut)
        assert process.get("/readyz")[1]["members"] == {"asleep": 0, "loading": 0, "loaded": 2, "failed": 0}
        status, refused = ask(process, "third")
        assert (status, refused["error"]["code"]) == (404, "model_not_found")
        assert "'third' is not served here; this gateway serves 'other, tiny'" in refused["error"]["message"]
        assert ask(process, None)[0] == 400
        assert ask(process, "tiny", path="/tokenize")[1]["count"] == len(pipelines[0].model.tokenizer.encode("hello").ids)
        assert process.get("/v1/models/tiny")[0] == 200
        wait_until(lambda: states(process) == {"tiny": "serving", "other": "serving"})
        seen = overview(process)
        assert (seen["fleet"], seen["ready"], seen["devices"], seen["members"]["tiny"]["stages"]) == ("models", True, 4, 3)
        wait_until(lambda: metric(process, "lamina_fleet_pod_seconds_total") > 0)
        text = process.get("/metrics")[1]
        assert set(re.findall(r'[{,]model="([^"]*)"', text)) == {"tiny", "other"}, "no label is a name that a client wrote"
        assert 'lamina_fleet_pods{model="tiny"} 3.0' in text
        for pipeline in pipelines:
            assert f'lamina_gateway_answers_total{{model="{pipeline.name}",outcome="length"}} 1.0' in text
        watched = {urlsplit(each).path for each in api.requests if "watch=1" in each}
        assert len(watched) == 2, "one watch of ConfigMaps and one of EndpointSlices, whatever the number of stages"


def test_members_come_change_and_go_without_a_restart(pipelines: tuple[Pipeline, Pipeline]) -> None:
    tiny, other = pipelines
    with fleet(pipelines, tiny.member()) as (process, api):
        assert ask(process, "other")[0] == 404
        api.put(other.member())
        wait_until(lambda: models(process) == ["other", "tiny"])
        assert ask(process, "other")[0] == 200
        assert ask(process, "tiny")[0] == 200
        api.put(other.member(LAMINA_CLIENT_MAX_TOKENS="2"))
        wait_until(lambda: ask(process, "other")[1]["usage"]["completion_tokens"] == 2)
        assert process.get("/readyz")[1]["members"]["loaded"] == 2, "the other member's part stayed"
        api.put(other.member(LAMINA_QUEUE_LIMIT="many"))
        wait_until(lambda: ask(process, "other")[0] == 503)
        assert "member other cannot be served: LAMINA_QUEUE_LIMIT: 'many' is not allowed" in process.log
        api.delete("other")
        wait_until(lambda: models(process) == ["tiny"])
        assert ask(process, "other")[0] == 404
        assert ask(process, "tiny")[0] == 200
        assert metric(process, "lamina_fleet_evictions_total") == 0


def test_a_canary_gets_its_share_of_one_member(pipelines: tuple[Pipeline, Pipeline]) -> None:
    tiny, other = pipelines
    stable, canary = tiny.member(), other.member("tiny-canary", 50)
    # Another cut of the same model, as the canary of a member has it.
    canary["data"] |= {"LAMINA_MODEL": "tiny", "LAMINA_PIPELINE": tiny.model.fingerprint(WHOLE)}
    canary["data"]["LAMINA_STAGES"] = f"0:6={other.urls[0]}"
    with fleet(pipelines, stable, canary) as (process, _):
        assert models(process) == ["tiny"]
        for _ in range(40):
            ask(process, "tiny")
            if process.get("/readyz")[1]["members"]["loaded"] == 2:
                return
        raise AssertionError("40 requests, and one of two versions with half of them each got none")


def test_keys_of_a_member_open_that_member_only(pipelines: tuple[Pipeline, Pipeline], tmp_path: Path) -> None:
    (tmp_path / "tiny").write_text("key-of-tiny\n")
    with fleet(pipelines, LAMINA_FLEET_KEYS=str(tmp_path)) as (process, _):
        assert ask(process, "tiny", "key-of-tiny")[0] == 200
        assert models(process, "key-of-tiny") == ["tiny"]
        wait_until(lambda: list(states(process, "key-of-tiny")) == ["tiny"])
        with pytest.raises(urllib.error.HTTPError) as refused:
            overview(process, "another key")
        assert refused.value.code == 401
        assert ask(process, "tiny")[0] == 401
        assert ask(process, "other", "key-of-tiny")[0] == 404, "nobody has a key of it yet"
        (tmp_path / "other").write_text("key-of-other name=bob max_tokens=1\n")
        status, refused = ask(process, "other", "key-of-tiny")
        assert (status, refused["error"]["code"]) == (404, "model_not_found")
        assert process.get("/readyz")[1]["members"]["asleep"] == 1, "a key of another member loads and wakes nothing"
        wait_until(lambda: ask(process, "other", "key-of-other")[0] == 200)
        assert ask(process, "other", "key-of-other")[1]["usage"]["completion_tokens"] == 1
        assert ask(process, "tiny", "key-of-other")[0] == 404


def test_idle_members_are_given_up_for_memory(pipelines: tuple[Pipeline, Pipeline]) -> None:
    with fleet(pipelines, LAMINA_FLEET_MEMORY_BYTES="1") as (process, _):
        for round_ in (1, 2):
            for pipeline in pipelines:
                assert answered(process, pipeline.name)["choices"][0]["text"] == text_of(pipeline)
            wait_until(lambda: process.get("/readyz")[1]["members"]["asleep"] == 2)
            assert metric(process, "lamina_fleet_evictions_total") >= 2 * round_


def test_a_member_answers_batches_also_after_its_gateway_died(pipelines: tuple[Pipeline, Pipeline]) -> None:
    """`?model=` names it, or it is the only one that has a place for them."""
    tiny, other = pipelines
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "tiny", "prompt": "hello", "max_tokens": 6, "temperature": 0},
        }
        for number in range(3)
    ]
    members = tiny.member(LAMINA_JOBS_STORE="lamina/jobs"), other.member()
    with fleet(pipelines, *members, LAMINA_FLEET_MEMORY_BYTES="1") as (process, _), _openai(process) as client:
        file = client.files.create(file=("input.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
        with pytest.raises(openai.NotFoundError, match="no member with the model other serves files"):
            client.files.list(extra_query={"model": "other"})
    with fleet(pipelines, *members) as (process, _), _openai(process) as client:
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    with fleet(pipelines, *members) as (process, _), _openai(process) as client:
        # Nobody asks for it: the gateway finds it open.
        wait_until(lambda: process.get("/readyz")[1]["members"]["asleep"] == 1)
        wait_until(lambda: client.batches.retrieve(batch.id, extra_query={"model": "tiny"}).status == "completed")
        content = client.files.content(str(client.batches.retrieve(batch.id).output_file_id)).text
    texts = [json.loads(line)["response"]["body"]["choices"][0]["text"] for line in content.splitlines()]
    assert texts == [text_of(tiny)] * 3


def _openai(process: FunctionProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=10)


def test_events_go_to_the_member_that_they_name(pipelines: tuple[Pipeline, Pipeline], tmp_path: Path) -> None:
    """Through the rendered Broker. The attribute `model` names the member, or `model` in the data."""
    asyncio.run(_send_events(pipelines, tmp_path))


async def _send_events(pipelines: tuple[Pipeline, Pipeline], folder: Path) -> None:
    tiny, other = pipelines
    asked = GenerateRequest(prompt="hello", max_tokens=6)
    of_other = GenerateRequest(prompt="hello", max_tokens=6, model="other")
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 6, "temperature": 0}
    lines = [{"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body} for number in range(2)]
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    answered = [
        json_event(EventType.GENERATE_REQUEST, "/jobs", asked, id="attribute", model="tiny"),
        json_event(EventType.GENERATE_REQUEST, "/jobs", of_other, id="data"),
        make_event(EventType.BATCH_REQUEST, "/jobs", data, JSONL_CONTENT_TYPE, id="batch", model="tiny"),
    ]
    refused = [
        json_event(EventType.GENERATE_REQUEST, "/jobs", asked, id="unnamed"),
        json_event(EventType.GENERATE_REQUEST, "/jobs", asked, id="unknown", model="third"),
        json_event(EventType.GENERATE_REQUEST, "/jobs", of_other, id="contradiction", model="tiny"),
        json_event(EventType.SCORE_REQUEST, "/jobs", {"text": "hello"}, id="score", model="tiny"),
    ]
    async with event_sink() as answers, event_sink() as dead_letters, client() as session, AsyncExitStack() as stack:
        url = ""
        eventing = LocalEventing(lambda *_: url, folder)
        stack.push_async_callback(eventing.stop)
        sinks = {"dead_letter_sink": dead_letters.url, "reply_sink": answers.url}
        delivery = {"retry": 4, "backoff_policy": "linear", "backoff_seconds": 0.2, "timeout_seconds": 120}
        objects = eventing_objects(fleet_door(fleet_of(eventing=sinks | delivery)))
        await eventing.apply(objects[:1])  # the Broker, whose URL the gateway gets
        broker = eventing.broker_url("models")
        members = tiny.member(LAMINA_JOBS_STORE="lamina/event-jobs"), other.member()
        with fleet(pipelines, *members, K_SINK=broker) as (process, _):
            url = process.url
            await eventing.apply(objects)
            for event in answered + refused:
                assert await post(session, broker, event) == (202, "")
            await until(lambda: len(answers.once()) == len(answered) and len(dead_letters.once()) == len(refused), 120)
            for event in answered[:2]:
                headers, buffers = to_structured_http(event)
                async with session.post(url, data=b"".join(buffers), headers=headers) as reply:
                    assert (reply.status, (await reply.json())["data"]["text"]) == (200, text_of(tiny))
    causes = {str(event.get_extension(Attribute.CAUSATION_ID)): event for event in answers.events}
    for id_ in ("attribute", "data"):
        assert json_data(causes[id_], GenerateResponse).text == text_of(tiny)
    results = [json.loads(line) for line in bytes(causes["batch"].get_data()).splitlines()]  # type: ignore[arg-type]
    assert [each["response"]["body"]["choices"][0]["text"] for each in results] == [text_of(tiny)] * len(lines)
    sources = {causes["attribute"].get_source(), causes["data"].get_source()}
    assert sources == {f"/pipelines/{each.model.fingerprint(each.cut)}/gateway" for each in pipelines}
    assert {letter.get_id(): _reason(letter) for letter in dead_letters.events} == {
        "unnamed": ("400", "malformed-event"),
        "unknown": ("404", "not-found"),
        "contradiction": ("404", "model-not-found"),
        "score": ("400", "unknown-event-type"),
    }


def _reason(letter: CloudEvent) -> tuple[str, str]:
    """Status and problem that a dead letter names."""
    problem = json.loads(base64.b64decode(str(letter.get_extension("knativeerrordata"))))
    return str(letter.get_extension("knativeerrorcode")), problem["type"].rpartition(":")[2]


def test_members_take_turns_with_few_devices(pipelines: tuple[Pipeline, Pipeline]) -> None:
    """`tiny` has three pods, and there are three devices: `other` is let in when those are gone."""
    tiny, other = pipelines
    with fleet(pipelines, LAMINA_FLEET_MAX_DEVICES="3") as (process, api), ThreadPoolExecutor(1) as executor:
        for each in other.slices():
            api.delete(each["metadata"]["name"])
        assert ask(process, "tiny")[0] == 200
        waiting = executor.submit(ask, process, "other")
        assert ask(process, "other", path="/tokenize")[0] == 200, "it needs no stage"
        assert not waiting.done()
        wait_until(lambda: states(process).get("other") == "waiting")
        wait_until(lambda: overview(process)["members"]["other"]["device_wait_seconds"] > 0)  # looked at once a second
        assert 0 < metric(process, "lamina_fleet_device_wait_seconds") < 600
        for each in tiny.slices():
            api.delete(each["metadata"]["name"])
        wait_until(lambda: states(process) == {"tiny": "zero", "other": "starting"})
        for each in other.slices():
            api.put(each)
        assert waiting.result(timeout=60)[0] == 200
