"""The access log has a line for each request, however it ended."""

import hashlib
import json
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from functions.gateway.app import MAX_REQUEST_BYTES
from tests.support.functions.scripted_gateway import EVENT, Pipeline, client_of

KEY = "a-key-of-a-client"
PROMPT = "an extraordinary prompt"
BEARER = {"Authorization": f"Bearer {KEY}"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}]}


class Log(list[str]):
    """The lines, and a client whose requests write them."""

    def __init__(self, pipeline: Pipeline, **environ: str) -> None:
        super().__init__()
        self.client: FlaskClient = client_of(pipeline, self.append, LAMINA_API_KEYS=KEY, **environ)

    def post(self, path: str, **asked: Any) -> TestResponse:
        """Reads the reply to its end and closes it, as the server does."""
        return self.client.post(path, buffered=True, **asked)

    @property
    def last(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self[-1])
        return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_has_client_and_tokens_but_no_key_and_no_text(pipeline: Pipeline, stream: bool) -> None:
    log = Log(pipeline)
    chat = log.post("/v1/chat/completions", json=CHAT | {"stream": stream}, headers=BEARER)
    assert chat.data.endswith(b"data: [DONE]\n\n" if stream else b"}")
    of_chat = log.last
    accept = {"Accept": "text/event-stream"} if stream else {}
    event = log.post("/", json={"prompt": PROMPT}, headers=EVENT | BEARER | accept)
    assert b"dev.lamina.generate.response" in event.data or not stream
    for line, reply in ((of_chat, chat), (log.last, event)):
        assert line["client_id"] == hashlib.sha256(KEY.encode()).hexdigest()[:12]
        assert (line["method"], line["status"], line["outcome"]) == ("POST", 200, "stop")
        assert line["request_id"] == reply.headers["X-Request-Id"]
        assert line["prompt_tokens"] == len(pipeline.prompts[0 if line is of_chat else 1].token_ids)
        assert line["completion_tokens"] > 1
        assert 0 <= line["first_token_seconds"] <= line["seconds"]
        assert set(line) >= {"time", "path", "replays"}
    assert len(log) == 2
    for secret in (KEY, PROMPT, "Hello"):
        assert secret not in "".join(log)


def test_prompts_and_answers_are_logged_if_configured(pipeline: Pipeline) -> None:
    log = Log(pipeline, LAMINA_ACCESS_LOG="prompts")
    assert log.post("/v1/chat/completions", json=CHAT, headers=BEARER).status_code == 200
    assert log.last["messages"] == [{"role": "user", "content": PROMPT}]
    assert log.last["text"] == "Hello there"
    assert KEY not in "".join(log)


def test_the_log_can_be_turned_off(pipeline: Pipeline) -> None:
    log = Log(pipeline, LAMINA_ACCESS_LOG="off")
    assert log.post("/v1/chat/completions", json=CHAT, headers=BEARER).status_code == 200
    assert not log


def test_a_refused_request_has_a_line(pipeline: Pipeline) -> None:
    log = Log(pipeline)
    asked = log.post
    replies = [
        asked("/v1/chat/completions", json=CHAT, headers={"Authorization": "Bearer another-key"}),
        asked("/v1/chat/completions", data=b"{" + PROMPT.encode(), headers=BEARER),
        asked("/", data=bytes(MAX_REQUEST_BYTES + 1), headers=EVENT | BEARER),
        log.client.get("/nowhere?secret=1", buffered=True),
    ]
    assert [json.loads(line)["status"] for line in log] == [401, 400, 413, 404] == [reply.status_code for reply in replies]
    assert [json.loads(line)["client_id"] is None for line in log] == [True, False, False, True]
    for secret in ("another-key", PROMPT, "secret=1"):
        assert secret not in "".join(log)


def test_a_stream_that_its_client_leaves_has_a_line(pipeline: Pipeline) -> None:
    log = Log(pipeline)
    pipeline.script = pipeline.say("Hello there", end=False)
    reply = log.client.post("/v1/chat/completions", json=CHAT | {"stream": True}, headers=BEARER)
    next(reply.iter_encoded())
    assert not log
    reply.close()
    assert (log.last["status"], log.last["outcome"]) == (200, "cancelled")
