"""Structured output: every option for it becomes the same grammar for the last stage."""

import json
from typing import Any

import pytest
from flask.testing import FlaskClient

from eventing.wire.events import Grammar, grammar_digest
from tests.support.functions.grammar_sources import of_schema
from tests.support.functions.scripted_gateway import EVENT, Pipeline, chat

SCHEMA = {"properties": {"a": {"type": "integer"}}, "type": "object"}  # sorted, as the test client writes it


def grammar(pipeline: Pipeline) -> Grammar:
    sampling = pipeline.prompts[-1].sampling
    assert sampling.prompt_tokens == len(pipeline.prompts[-1].token_ids)
    assert sampling.grammar.digest == grammar_digest(sampling.grammar.source)
    assert set(sampling.grammar.end_ids) == pipeline.prompts[-1].eos_ids
    return sampling.grammar


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
    ],
)
def test_every_option_for_a_schema_gives_the_same_grammar(
    client: FlaskClient, pipeline: Pipeline, asked: dict[str, Any]
) -> None:
    assert chat(client, **asked).status_code == 200
    assert grammar(pipeline).source == of_schema(SCHEMA)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"response_format": {"type": "json_object"}}, '"type": "object"'),
        ({"structured_outputs": {"json_object": True}}, '"type": "object"'),
        ({"structured_outputs": {"regex": "a+"}}, "/a+/"),
        ({"guided_regex": "a+"}, "/a+/"),
        ({"structured_outputs": {"choice": ["a", 'b"c']}}, r'"a" | "b\"c"'),
        ({"guided_choice": ["a", "b"]}, '"a" | "b"'),
        ({"structured_outputs": {"grammar": "start: /x/"}}, "start: /x/"),
        ({"structured_outputs": {"grammar": 'root ::= "x" [0-9]+'}}, '"x" /[0-9]/+'),
        ({"guided_grammar": "start: /x/"}, "start: /x/"),
    ],
)
def test_options_for_other_structures(client: FlaskClient, pipeline: Pipeline, asked: dict[str, Any], said: str) -> None:
    assert chat(client, **asked).status_code == 200
    assert said in grammar(pipeline).source


def test_events_and_completions_have_structured_output(client: FlaskClient, pipeline: Pipeline) -> None:
    told = {"prompt": "Hi", "structured_outputs": {"json": SCHEMA}}
    assert client.post("/", headers=EVENT, json=told).status_code == 200
    assert grammar(pipeline).source == of_schema(SCHEMA)
    assert client.post("/v1/completions", json={"model": "tiny", **told}).status_code == 200
    assert grammar(pipeline).source == of_schema(SCHEMA)


def test_a_grammar_that_does_not_compile_is_never_queued(client: FlaskClient, pipeline: Pipeline) -> None:
    for _ in range(2):
        assert chat(client, structured_outputs={"grammar": "start: nothing"}).status_code == 400
    nested: dict[str, Any] = {}
    for _ in range(400):
        nested = {"items": nested}
    assert chat(client, structured_outputs={"json": nested}).status_code == 400
    assert chat(client, structured_outputs={"json": '{"const": "\\ud800"}'}).status_code == 400
    assert not pipeline.prompts
