"""`/v1/responses` over a scripted pipeline: refusals, thoughts and tools, checked by the official client's types."""

import json
import threading
from typing import Any

import pytest
from flask.testing import FlaskClient
from msgspec.structs import replace
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseStreamEvent
from pydantic import TypeAdapter

from eventing.http.sse import SSEDecoder
from eventing.problems import PipelineUnavailable
from eventing.wire.generation import Message, ProgressEvent
from functions.gateway.openai import responses_requests
from tests.support.functions.scripted_gateway import TOKENIZER, Pipeline, client_of
from tests.support.storage.published import CHAT_TEMPLATE

ADD = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALLS = [f'<tool_call>\n{{"name": "add", "arguments": {{"a": {number}}}}}\n</tool_call>' for number in (1, 2)]
EVENTS: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def client(pipeline: Pipeline) -> FlaskClient:
    return client_of(pipeline, context=4096)


def respond(client: FlaskClient, **fields: Any) -> Any:
    return client.post("/v1/responses", json={"model": "tiny", "input": "Hi", "tools": [ADD], **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"previous_response_id": "resp_1"}, '`previous_response_id` is "resp_1"'),
        ({"background": True}, "`background` is true"),
        ({"tools": [{"type": "web_search"}]}, "`tools[0].type`"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"input": [{"role": "user"}]}, "input[0] lacks `role` or `content`"),
        ({"n": 2}, "n is 2; a response has one answer"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is no option that is served here; leave it out"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "said more than once"),
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


def test_calls_are_their_own_items(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say("I add. " + "\n".join(CALLS))
    response = Response.model_validate_json(respond(client).data)
    assert response.status == "completed"
    assert response.output_text == "I add."
    calls = [item for item in response.output if isinstance(item, ResponseFunctionToolCall)]
    assert [(call.name, call.arguments, call.status) for call in calls] == [
        ("add", '{"a": 1}', "completed"),
        ("add", '{"a": 2}', "completed"),
    ]
    assert len({call.call_id for call in calls} | {call.id for call in calls}) == 4
    assert [tool.name for tool in response.tools if tool.type == "function"] == ["add"]


def test_calls_stream_as_events(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say("I add. " + "\n".join(CALLS))
    sent = [json.loads(event.data) for event in SSEDecoder().feed(respond(client, stream=True).data)]
    events = [EVENTS.validate_python(event) for event in sent]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    arguments: dict[str, str] = {}
    for event in events:
        if event.type == "response.function_call_arguments.delta":
            arguments[event.item_id] = arguments.get(event.item_id, "") + event.delta
        if event.type == "response.function_call_arguments.done":
            assert arguments[event.item_id] == event.arguments
    assert list(arguments.values()) == ['{"a": 1}', '{"a": 2}']
    added = [event.item.type for event in events if event.type == "response.output_item.added"]
    assert added == ["message", "function_call", "function_call"]
    last = events[-1]
    assert last.type == "response.completed"
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert last.response.output == done


def test_a_forced_call_has_a_grammar(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say(CALLS[0])
    for choice in ("required", {"type": "function", "name": "add"}):
        assert respond(client, tool_choice=choice).status_code == 200
        assert pipeline.prompts[-1].sampling.grammar is not None
    refused = respond(client, tool_choice={"type": "function", "name": "other"})
    assert refused.status_code == 400
    assert "none of the tools" in refused.get_json()["error"]["message"]


def test_calls_and_their_outputs_reach_the_prompt(client: FlaskClient, pipeline: Pipeline) -> None:
    items = [
        {"role": "user", "content": "1 and 1?"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I add."}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "add", "arguments": '{"a": 2}'},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": "two"},
    ]
    assert respond(client, input=items).status_code == 200
    told = TOKENIZER.decode(list(pipeline.prompts[-1].token_ids), skip_special_tokens=False)
    assert "<|im_start|>assistant\nI add.\n" + "\n".join(CALLS) + "<|im_end|>" in told
    assert "<tool_response>\none\n</tool_response>" in told
    assert "<tool_response>\ntwo\n</tool_response>" in told
    lacks = respond(client, input=[{"type": "function_call", "name": "add"}])
    assert lacks.status_code == 400
    assert "lacks `call_id`" in lacks.get_json()["error"]["message"]


def test_many_calls_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying them again for each call took 10 s for 40,000 calls, before any limit was checked."""
    copied = 0

    def counting(message: Message, **fields: Any) -> Message:
        nonlocal copied
        copied += len(fields["tool_calls"])
        return replace(message, **fields)

    monkeypatch.setattr(responses_requests, "replace", counting)
    call = responses_requests.InputItem(type="function_call", call_id="c", name="add", arguments="{}")
    said = responses_requests.InputItem(role="assistant", content="I add.")
    (message,) = responses_requests.ResponsesRequest(model="tiny", input=(said, *[call] * 100)).messages()
    assert len(message.tool_calls) == 100
    assert copied <= 100


@pytest.mark.slow
def test_progress_is_an_event_of_the_stream(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.awaited = ProgressEvent("turn", "turn in the queue, 3 waiting", waiting=3)
    pipeline.script = lambda stream: threading.Timer(1.2, pipeline.say("Hello"), (stream,)).start()
    response = respond(client, stream=True, stream_options={"include_progress": True})
    events = [json.loads(event.data) for event in SSEDecoder().feed(response.data)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:3]] == ["response.created", "response.in_progress", "response.progress"]
    assert events[2]["progress"] == {"awaits": "turn", "text": "turn in the queue, 3 waiting", "waiting": 3}
    assert events[-1]["type"] == "response.completed"
