"""The door for clients of the OpenAI API."""

from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.support.functions.doors import TOKENIZER, Pipeline, chat


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "gpt-4"}, 404, "'gpt-4'"),
        ({"n": 2}, 400, "$.n"),
        ({"tools": [{"type": "function"}]}, 400, "$.tools"),
        ({"presence_penalty": 0.5}, 400, "$.presence_penalty"),
        ({"logprobs": True}, 400, "$.logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "$.response_format"),
        ({"temperature": 3}, 400, "$.temperature"),
        ({"no_such_field": 1}, 400, "no_such_field"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
    ],
)
def test_what_the_openai_door_does_not_serve_it_names(
    client: FlaskClient, fields: dict[str, Any], status: int, words: str
) -> None:
    response = chat(client, **fields)
    assert response.status_code == status
    assert response.json is not None
    assert words in response.json["error"]["message"]
    assert response.json["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", ["Hi there", [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]])
def test_a_prediction_reaches_the_pipeline(client: FlaskClient, pipeline: Pipeline, content: Any) -> None:
    """https://platform.openai.com/docs/guides/predicted-outputs"""
    assert chat(client, prediction={"type": "content", "content": content}).status_code == 200
    (prompt,) = pipeline.prompts
    assert TOKENIZER.decode(prompt.predicted_ids) == "Hi there"


def test_openai_options_reach_the_pipeline(client: FlaskClient, pipeline: Pipeline) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    fields = {"n": 1, "user": "me", "logit_bias": {}, "top_k": 3, "max_completion_tokens": 7, "max_tokens": 9, "stop": "x"}
    response = chat(client, messages=[{"role": "developer", "content": parts}], **fields)
    assert response.status_code == 200
    (prompt,) = pipeline.prompts
    assert (prompt.max_tokens, prompt.sampling.top_k, prompt.sampling.temperature) == (7, 3, 1.0)
    assert "<|im_start|>system\nHi" in TOKENIZER.decode(prompt.token_ids, skip_special_tokens=False)
