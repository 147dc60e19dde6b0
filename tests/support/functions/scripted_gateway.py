"""The gateway's APIs over a scripted pipeline, for cases that a real one rarely has."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from eventing.http.sse import SSEDecoder
from eventing.problems import Problem
from eventing.wire.generation import ProgressEvent
from functions.gateway.answers.adapters import ServedModels
from functions.gateway.answers.authentication import KeyRing
from functions.gateway.answers.metrics import GatewayMetrics
from functions.gateway.answers.service import AnswerService
from functions.gateway.app import client_limits, create_app
from functions.gateway.scheduling.sequence import Prompt
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.text.chat_template import ChatTemplate
from functions.gateway.text.tokenizer import ModelText
from tests.support.environments import gateway_config
from tests.support.storage.published import CHAT_TEMPLATE, byte_tokenizer

TOKENIZER = byte_tokenizer()
END = 4
CONTEXT = 64
APIS = ("events", "openai")
EVENT = {
    "ce-specversion": "1.0",
    "ce-id": "1",
    "ce-source": "/client",
    "ce-type": "dev.lamina.generate.request",
    "Content-Type": "application/json",
}
_numbers = count()
Script = Callable[[TokenStream], None]


class Pipeline:
    """Answers each prompt with "Hello there" and an end token, or runs `script`."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self.cancelled = threading.Event()
        self.metrics = GatewayMetrics()
        self.entered = 0
        self.full: Problem | None = None  # raised by `entering`
        self.awaited: ProgressEvent | None = None
        self.script: Script = self.say("Hello there")

    @contextmanager
    def entering(self, _client_id: str) -> Iterator[None]:
        self.entered += 1
        if self.full is not None:
            raise self.full
        yield

    def submit(self, prompt: Prompt) -> TokenStream:
        self.prompts.append(prompt)
        self.stream = stream = TokenStream(
            prompt.max_tokens, prompt.eos_ids, self.cancelled.set, prompt.arrived, prompt.kept_end_ids, lambda: self.awaited
        )
        self.script(stream)
        return stream

    def value(self, name: str, **labels: str) -> float:
        """The value of a metric, whose name is given without `lamina_gateway_`."""
        return self.metrics.registry.get_sample_value(f"lamina_gateway_{name}", labels) or 0.0

    def say(self, text: str, end: bool = True, then: Problem | None = None) -> Script:
        def script(stream: TokenStream) -> None:
            stream.started(0)
            for token in TOKENIZER.encode(text, add_special_tokens=False).ids + [END] * end:
                stream.put(token)
            if then is not None:
                stream.fail(then)

        return script


def refuse(problem: Problem) -> Script:
    def script(_: TokenStream) -> None:
        raise problem

    return script


def client_of(
    pipeline: Pipeline,
    write_line: Callable[[str], object] = lambda _: None,
    *,
    context: int = CONTEXT,
    template: str = CHAT_TEMPLATE,
    **environ: str,
) -> FlaskClient:
    config = gateway_config(**environ)
    parses = config.parse_control_tokens == "on"
    text = ModelText(TOKENIZER, ChatTemplate(template, {}), frozenset([END]), context, parse_control_tokens=parses)
    keys = KeyRing(config.api_keys, config.api_key_files or (), takes_budgets=config.limits_store is not None)
    answers = AnswerService(
        text, pipeline, pipeline.metrics, limits=client_limits(config, keys), models=ServedModels(config.model, None)
    )
    return create_app(config, lambda: answers, pipeline.metrics, keys, write_line).test_client()


def ask(client: FlaskClient, data: Any, **headers: str) -> TestResponse:
    """Sends an event with a new id, unless `ce_id` is given."""
    return client.post(
        "/",
        json=data,
        headers=EVENT
        | {"ce-id": f"asked-{next(_numbers)}"}
        | {name.replace("_", "-"): value for name, value in headers.items()},
    )


def chat(client: FlaskClient, **fields: Any) -> TestResponse:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]} | fields
    return client.post("/v1/chat/completions", json=body)


def ask_either(client: FlaskClient, api: str, *, streams: bool = False, include_progress: bool | None = None) -> TestResponse:
    """Sends "Hi" by one of APIS."""
    option = {} if include_progress is None else {"include_progress": include_progress}
    if api == "openai":
        return chat(client, stream=streams, **({"stream_options": option} if option else {}))
    return ask(client, {"prompt": "Hi"} | option, Accept="text/event-stream" if streams else "application/json")


def stream(response: TestResponse) -> list[Any]:
    """Data of the events of a stream."""
    events = [event.data for event in SSEDecoder().feed(response.data)]
    return [event if event == "[DONE]" else json.loads(event) for event in events]
