"""`/v1/responses`: the official client against a real pipeline, and every document checked by the client's types."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from eventing.http.sse import SSEDecoder
from eventing.problems import PipelineUnavailable
from tests.support.functions.functions import FunctionProcess, running_gateway
from tests.support.functions.scripted_gateway import Pipeline, client_of
from tests.support.storage.published import CHAT_TEMPLATE, Published, until_end
from tests.support.storage.tiny_models import greedy

EVENTS: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def gateway(published: Published) -> Iterator[FunctionProcess]:
    with running_gateway(published) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def client(gateway: FunctionProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(published: Published, *turns: tuple[str, str], count: int = 8) -> str:
    prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    ids = published.tokenizer.encode(prompt, add_special_tokens=False).ids
    text: str = published.tokenizer.decode(until_end(greedy(published.model, ids, count)))
    return text


def asked(**fields: Any) -> Any:
    return {"model": "tiny", "temperature": 0, "max_output_tokens": 8} | fields


def test_instructions_are_the_system_message(client: openai.OpenAI, published: Published) -> None:
    response = client.responses.create(**asked(input="Hi", instructions="Be kind."))
    assert response.output_text == expected(published, ("system", "Be kind."), ("user", "Hi"))
    assert response.status in ("completed", "incomplete")
    assert (response.status == "incomplete") == (response.incomplete_details is not None)
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_output_items_can_be_sent_back_as_input(client: openai.OpenAI, published: Published) -> None:
    first = client.responses.create(**asked(input="Hi"))
    items: Any = [{"role": "user", "content": "Hi"}, *(item.model_dump() for item in first.output)]
    items.append({"role": "user", "content": [{"type": "input_text", "text": "And"}, {"type": "input_text", "text": " now?"}]})
    second = client.responses.create(**asked(input=items))
    said = ("user", "Hi"), ("assistant", first.output_text), ("user", "And now?")
    assert second.output_text == expected(published, *said)


def test_a_streams_events_build_the_response(client: openai.OpenAI) -> None:
    answer = client.responses.create(**asked(input="Hi")).output_text
    stops = {"stop": answer[len(answer) // 2 :][:1]}
    whole = client.responses.create(**asked(input="Hi"), extra_body=stops)
    with client.responses.stream(**asked(input="Hi"), extra_body=stops) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert [event.sequence_number for event in events] == sorted(event.sequence_number for event in events)
    types = [event.type for event in events]
    assert types[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert types[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_documents_and_events_have_the_clients_types(gateway: FunctionProcess) -> None:
    include = ["message.output_text.logprobs"]
    fields = asked(input="Hi", include=include, top_logprobs=2)
    document = httpx.post(f"{gateway.url}/v1/responses", json=fields).json()
    response = Response.model_validate(document, strict=True)
    part: Any = response.output[0]
    logprobs = part.content[0].logprobs
    assert b"".join(bytes(one.bytes) for one in logprobs).decode(errors="replace") == response.output_text
    streamed = httpx.post(f"{gateway.url}/v1/responses", json=fields | {"stream": True})
    events = [(event.event, json.loads(event.data)) for event in SSEDecoder().feed(streamed.content)]
    for name, event in events:
        assert EVENTS.validate_python(event).type == name
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
    (done,) = [event for name, event in events if name == "response.output_text.done"]
    assert done["logprobs"] == json.loads(json.dumps([one.model_dump() for one in logprobs]))


def test_an_answer_follows_its_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    text: Any = {"format": {"type": "json_schema", "name": "one", "schema": schema}}
    response = client.responses.create(**asked(input="Hi", text=text, max_output_tokens=64))
    assert json.loads(response.output_text)["a"] in (1, 2)
    assert response.status == "completed"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"previous_response_id": "resp_1"}, '`previous_response_id` is "resp_1"'),
        ({"background": True}, "`background` is true"),
        ({"tools": [{"type": "web_search"}]}, "`tools[0].type`"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"input": [{"role": "user"}]}, "input[0] lacks `role` or `content`"),
        ({"n": 2}, "n is 2; a response has one answer"),
        ({"top_logprobs": 2}, "top_logprobs takes `include`"),
    ],
)
def test_an_option_that_is_not_served_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    refused = client_of(Pipeline()).post("/v1/responses", json={"model": "tiny", "input": "Hi"} | fields)
    assert refused.status_code == 400
    assert words in refused.get_json()["error"]["message"]


def test_thoughts_are_their_own_item() -> None:
    pipeline = Pipeline()
    client = client_of(pipeline, template=CHAT_TEMPLATE + "{# </think> #}")
    pipeline.script = pipeline.say("<think>\nHm.\n</think>\n\nSaid")
    body = {"model": "tiny", "input": "Hi"}
    response = Response.model_validate(client.post("/v1/responses", json=body).json, strict=True)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output_text == "Said"
    events = SSEDecoder().feed(client.post("/v1/responses", json=body | {"stream": True}).data)
    documents = [EVENTS.validate_python(json.loads(event.data)) for event in events]
    last: Any = documents[-1]
    assert last.type == "response.completed"
    assert [item.model_dump(exclude={"id"}) for item in last.response.output] == [
        item.model_dump(exclude={"id"}) for item in response.output
    ]
    thoughts = [event.delta for event in documents if event.type == "response.reasoning_text.delta"]
    assert "".join(thoughts) == "Hm."


def test_a_stream_that_fails_ends_with_an_error_event() -> None:
    pipeline = Pipeline()
    pipeline.script = pipeline.say("Hel", end=False, then=PipelineUnavailable("stage 1 is gone"))
    reply = client_of(pipeline).post("/v1/responses", json={"model": "tiny", "input": "Hi", "stream": True})
    *_, last = SSEDecoder().feed(reply.data)
    error: Any = EVENTS.validate_python(json.loads(last.data))
    assert (error.type, error.code, error.message) == ("error", "pipeline_unavailable", "stage 1 is gone")
