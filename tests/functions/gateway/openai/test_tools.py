"""Tools of chat completions: how the model is told of them, forced calls, and calls in answers."""

import json
import re
from typing import Any

import pytest
from flask.testing import FlaskClient

from eventing.wire.events import grammar_digest
from functions.grammars.compiler import GrammarCompiler
from functions.grammars.matcher import is_allowed
from functions.grammars.sources import UnusableGrammar
from tests.support.functions.scripted_gateway import EVENT, TOKENIZER, Pipeline, chat, client_of, stream
from tests.support.storage.published import END_IDS

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds numbers.", "parameters": PARAMETERS}}
LOOK_UP = {"type": "function", "function": {"name": "look_up", "parameters": {"$defs": {"q": {"const": "x"}}, "type": "object",
           "properties": {"q": {"$ref": "#/$defs/q"}}, "required": ["q"]}}}  # fmt: skip
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
LOOKED_UP = '<tool_call>\n{"name": "look_up", "arguments": {"q": "x"}}\n</tool_call>'
TWO = f"{CALL}\n{LOOKED_UP}"
TOLD = """\
{%- if tools %}[TOOLS]{{ tools | tojson }}{% endif %}
{%- for m in messages %}{{ m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] %} {{ call.id }} {{ call.function.name }} {{ call.function.arguments.a }}{% endfor %}
{%- if m.tool_call_id %} ({{ m.tool_call_id }}){% endif %};{% endfor %}"""
HISTORY = [
    {"role": "user", "content": "1 and 1?"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}]},
    {"role": "tool", "tool_call_id": "c1", "content": "2"},
]  # fmt: skip


@pytest.fixture
def client(pipeline: Pipeline) -> FlaskClient:
    return client_of(pipeline, context=4096)


def prompt_text(pipeline: Pipeline) -> str:
    text: str = TOKENIZER.decode(list(pipeline.prompts[-1].token_ids), skip_special_tokens=False)
    return text


def test_a_template_without_tools_gets_hermes_system_prompt(client: FlaskClient, pipeline: Pipeline) -> None:
    assert chat(client, tools=[ADD], messages=HISTORY).status_code == 200
    text = prompt_text(pipeline)
    assert text.startswith("<|im_start|>system\nYou are a function calling AI model.")
    (described,) = re.findall(r"<tools>\n(.*)\n</tools>", text, re.DOTALL)
    assert json.loads(described) == ADD
    assert '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 7}}\n</tool_call><|im_end|>' in text
    assert "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>" in text
    assert chat(client, tools=[ADD], messages=[{"role": "system", "content": "Be brief."}, *HISTORY]).status_code == 200
    assert prompt_text(pipeline).startswith("<|im_start|>system\nBe brief.\n\nYou are a function calling AI model.")


def test_a_template_with_tools_gets_them(pipeline: Pipeline) -> None:
    client = client_of(pipeline, context=4096, template=TOLD)
    assert chat(client, tools=[ADD], messages=HISTORY).status_code == 200
    assert prompt_text(pipeline).endswith("user: 1 and 1?;assistant:  c1 add 7;tool: 2 (c1);")
    assert json.loads(prompt_text(pipeline).removeprefix("[TOOLS]").partition("user:")[0]) == [ADD]


@pytest.mark.parametrize("nothing", [{"tools": [ADD], "tool_choice": "none"}, {"tools": []}, {"tools": None}])
def test_without_tools_calls_are_text(client: FlaskClient, pipeline: Pipeline, nothing: dict[str, Any]) -> None:
    pipeline.script = pipeline.say(CALL)
    response = chat(client, **nothing)
    assert response.get_json()["choices"][0]["message"]["content"] == CALL
    assert "function calling" not in prompt_text(pipeline)


def test_calls_have_the_apis_shape(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say(f"I look. {TWO}")
    response = chat(client, tools=[ADD, LOOK_UP])
    (choice,) = response.get_json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    calls = choice["message"]["tool_calls"]
    assert [(call["type"], call["function"]["name"]) for call in calls] == [("function", "add"), ("function", "look_up")]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"a": 1}, {"q": "x"}]
    assert len({call["id"] for call in calls}) == 2
    pipeline.script = pipeline.say(CALL)
    assert chat(client, tools=[ADD]).get_json()["choices"][0]["message"]["content"] is None


def test_an_answer_without_calls_has_no_tool_calls(client: FlaskClient) -> None:
    response = chat(client, tools=[ADD])
    (choice,) = response.get_json()["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "Hello there")
    assert "tool_calls" not in choice["message"]


def test_calls_stream_in_deltas(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say(f"I look. {TWO}")
    *chunks, done = stream(chat(client, tools=[ADD, LOOK_UP], stream=True))
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
    calls: dict[int, dict[str, str]] = {}
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls[call["index"]] = {"id": call["id"], "name": call["function"]["name"], "arguments": ""}
            calls[call["index"]]["arguments"] += call["function"]["arguments"]
    assert [(call["name"], call["arguments"]) for call in calls.values()] == [("add", '{"a": 1}'), ("look_up", '{"q": "x"}')]
    assert sum("tool_calls" in delta for delta in deltas) > 6, "arguments come as they are drawn"
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_that_is_cut_off_finishes_with_length(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say(CALL)
    response = chat(client, tools=[ADD], max_tokens=20)
    assert response.get_json()["choices"][0]["finish_reason"] == "length"


NAMED = {"type": "function", "function": {"name": "look_up"}}
FORCED: list[tuple[dict[str, Any], str, bool]] = [
    ({"tool_choice": "required"}, CALL, True),
    ({"tool_choice": "required"}, TWO, True),
    ({"tool_choice": "required"}, "Hello", False),
    ({"tool_choice": "required"}, CALL.replace('"a": 1', '"a": "1"'), False),
    ({"tool_choice": "required", "parallel_tool_calls": False}, CALL, True),
    ({"tool_choice": "required", "parallel_tool_calls": False}, TWO, False),
    ({"tool_choice": NAMED}, LOOKED_UP, True),
    ({"tool_choice": NAMED}, CALL, False),
    ({"tool_choice": NAMED}, f"{LOOKED_UP}\n{LOOKED_UP}", False),
    ({"tool_choice": NAMED, "parallel_tool_calls": True}, f"{LOOKED_UP}\n{LOOKED_UP}", False),
]


@pytest.mark.parametrize(("options", "text", "fits"), FORCED)
def test_a_forced_call_has_a_grammar_in_the_models_format(
    client: FlaskClient, pipeline: Pipeline, options: dict[str, Any], text: str, fits: bool
) -> None:
    assert chat(client, tools=[ADD, LOOK_UP], **options).status_code == 200
    grammar = pipeline.prompts[-1].sampling.grammar
    assert grammar.digest == grammar_digest(grammar.source)
    assert allows(grammar.source, text) is fits


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("[TOOL_CALLS]", '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}}]'),
        ("[TOOL_CALLS] [ARGS]", '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]look_up[ARGS]{"q": "x"}'),
        ("<|python_tag|>", '{"name": "add", "parameters": {"a": 1}}'),
    ],
)
def test_forced_calls_of_other_formats_are_parsed(pipeline: Pipeline, template: str, text: str) -> None:
    client = client_of(pipeline, context=4096, template=TOLD + "{# " + template + " #}")
    pipeline.script = pipeline.say(text)
    response = chat(client, tools=[ADD, LOOK_UP], tool_choice="required")
    assert response.get_json()["choices"][0]["finish_reason"] == "tool_calls"
    assert response.get_json()["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    grammar = pipeline.prompts[-1].sampling.grammar
    assert allows(grammar.source, text)


@pytest.mark.parametrize(
    ("template", "before", "call", "after"),
    [
        ("<tool_call>", "<tool_call>\n", '{"name": "add", "arguments": {"a": 1}}', "\n</tool_call>"),
        ("[TOOL_CALLS]", "[TOOL_CALLS][", '{"name": "add", "arguments": {"a": 1}}', "]"),
        ("[TOOL_CALLS] [ARGS]", "", '[TOOL_CALLS]add[ARGS]{"a": 1}', ""),
        ("<|python_tag|>", "", '{"name": "add", "parameters": {"a": 1}}', ""),
    ],
)
def test_a_function_that_is_named_is_called_exactly_once_in_every_format(
    pipeline: Pipeline, template: str, before: str, call: str, after: str
) -> None:
    client = client_of(pipeline, context=4096, template=TOLD + "{# " + template + " #}")
    named = {"type": "function", "function": {"name": "add"}}
    assert chat(client, tools=[ADD, LOOK_UP], tool_choice=named, parallel_tool_calls=True).status_code == 200
    source = pipeline.prompts[-1].sampling.grammar.source
    assert allows(source, before + call + after)
    for again in (
        f"{before}{call}, {call}{after}",
        f"{before}{call}{call}{after}",
        f"{before}{call}{after}\n{before}{call}{after}",
    ):
        assert not allows(source, again)


def allows(source: str, text: str) -> bool:
    """Tells whether the grammar allows `text` as a whole answer."""
    tokens = TOKENIZER.encode(text, add_special_tokens=False).ids
    try:
        (mask,) = GrammarCompiler(TOKENIZER.to_str).compile(source, END_IDS).allowed(tokens)
    except UnusableGrammar:
        return False
    return is_allowed(mask, END_IDS[0])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "required"}, 'tool_choice is "required", which takes tools'),
        ({"tools": [ADD], "tool_choice": NAMED}, "tool_choice names 'look_up', which is none of the tools"),
        ({"tools": [{"type": "function"}]}, "`tools[0]` is"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"tools": [ADD], "tool_choice": "required", "guided_regex": "a"}, "a forced tool call says already"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"not": {}}}}], "tool_choice": "required"},
         "`tools` cannot be forced"),
        ({"messages": [{"role": "user", "content": None}]}, "a message has no content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": HISTORY[1]["tool_calls"]}]}, "are the assistant's"),
    ],
)  # fmt: skip
def test_contradicting_options_are_refused(client: FlaskClient, pipeline: Pipeline, fields: dict[str, Any], words: str) -> None:
    response = chat(client, **fields)
    assert response.status_code == 400
    assert words in response.get_json()["error"]["message"]
    assert not pipeline.prompts


def test_events_with_tools_are_answered_with_the_models_own_text(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say(CALL)
    asked = {"messages": [{"role": "user", "content": "Hi"}], "tools": [ADD], "tool_choice": "required"}
    response = client.post("/", headers=EVENT, json=asked)
    assert response.get_json()["text"] == CALL
    assert pipeline.prompts[-1].sampling.grammar is not None


@pytest.mark.parametrize("template", [TOLD, None])
def test_arguments_with_lone_surrogates_stay_as_they_were_sent(pipeline: Pipeline, template: str | None) -> None:
    client = client_of(pipeline, context=4096, **({} if template is None else {"template": template}))
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": "\\ud800"}'}}
    assert chat(client, messages=[{"role": "assistant", "tool_calls": [call]}]).status_code == 200


def test_deeply_nested_tools_are_refused(client: FlaskClient) -> None:
    """Whether they can be parsed depends on the depth of the stack."""
    for depth in range(900, 1000, 2):
        parameters = '{"a":' * depth + "1" + "}" * depth
        tool = f'{{"type": "function", "function": {{"name": "f", "parameters": {parameters}}}}}'
        body = f'{{"model": "tiny", "messages": [{{"role": "user", "content": "Hi"}}], "tools": [{tool}]}}'
        assert client.post("/v1/chat/completions", data=body, content_type="application/json").status_code == 400, depth
