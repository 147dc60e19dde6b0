"""Gateways that are killed or paused, real processes all: what they held is free soon, and no answer is wrong.

Clients that ask again with the same key get the same answer, at whichever gateway.
"""

import contextlib
import json
import signal
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any

from eventing.wire.control import LEASE_SECONDS
from eventing.wire.events import EventType
from eventing.wire.generation import GenerateRequest
from tests.support.functions.functions import FunctionProcess, gateway_environment, running, running_gateway, wait_until
from tests.support.functions.metrics import metric
from tests.support.functions.streams import answer_of, began
from tests.support.storage.published import Published

PROMPT = "The capital of France is"
LONG_TOKENS = 200
SHORT_TOKENS = 5
DRAWN_TOKENS = 180
ROUNDS = 2
STREAMS = 4  # at each gateway
KEY = "a-key-of-this-test"
FREED_SECONDS = LEASE_SECONDS + 10.0  # the ten are for a busy machine


def test_a_killed_gateway_frees_what_it_held_and_a_paused_one_answers_right(
    published: Published, stages: list[FunctionProcess]
) -> None:
    expected = published.expected(PROMPT, LONG_TOKENS)
    assert len(expected) > 50, "long enough to be killed or paused in its midst"
    capacity = free(stages)
    environ = gateway_environment(published, [stage.url for stage in stages])
    with running([environ] * 3) as (killed, paused, honest), ThreadPoolExecutor(1) as honest_client, ExitStack() as streams:
        answer = stopped_amid_answers(streams, [killed, paused], stages, expected)
        killed.process.kill()
        killed.process.wait(60)
        over = threading.Event()
        asked = honest_client.submit(keep_asking, honest, over, expected[:SHORT_TOKENS])
        try:
            wait_until(lambda: held(stages) == 0, FREED_SECONDS)
        finally:
            over.set()
        asked.result()
        wait_until(lambda: free(stages) == capacity)  # the last answer's release may be on its way
        paused.process.send_signal(signal.SIGCONT)
        assert list(answer_of(answer).token_ids) == expected
        wait_until(lambda: free(stages) == capacity)
        assert metric(honest, "lamina_gateway_replays_total") == 0


def stopped_amid_answers(
    streams: ExitStack, gateways: list[FunctionProcess], stages: list[FunctionProcess], expected: list[int]
) -> HTTPResponse:
    """Stops gateways that the stages hold a sequence of each, and returns the last one's stream. Tries until it is in time."""
    while True:
        begun = [streams.enter_context(began(gateway, request(LONG_TOKENS))) for gateway in gateways]
        for gateway in gateways:
            gateway.process.send_signal(signal.SIGSTOP)
        if held(stages) >= len(gateways) * len(stages):
            return begun[-1]
        for gateway, stream in zip(gateways, begun, strict=True):
            gateway.process.send_signal(signal.SIGCONT)
            assert list(answer_of(stream).token_ids) == expected


def request(max_tokens: int) -> GenerateRequest:
    return GenerateRequest(PROMPT, max_tokens=max_tokens)


def keep_asking(gateway: FunctionProcess, over: threading.Event, expected: list[int]) -> None:
    while not over.wait(0.2):  # between two answers the stages hold none of its sequences
        with began(gateway, request(len(expected))) as stream:
            assert list(answer_of(stream).token_ids) == expected


def held(stages: list[FunctionProcess]) -> float:
    return sum(metric(stage, "lamina_stage_sequences") for stage in stages)


def free(stages: list[FunctionProcess]) -> list[float]:
    return [metric(stage, "lamina_stage_free_tokens") for stage in stages]


@dataclass
class Client:
    """Asks for one answer, under one key; drawn without a seed, so that only the key makes it repeatable."""

    name: str
    events: bool  # a CloudEvent with an id, or the OpenAI API with an Idempotency-Key

    def ask(self, gateway: FunctionProcess) -> HTTPResponse:
        data: dict[str, Any] = {"prompt": PROMPT * 3, "max_tokens": DRAWN_TOKENS, "temperature": 1.0, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", "Accept": "text/event-stream"}
        if self.events:
            own = {"ce-specversion": "1.0", "ce-type": EventType.GENERATE_REQUEST, "ce-source": "/tests", "ce-id": self.name}
            request = urllib.request.Request(gateway.url, json.dumps(data).encode(), headers | own)
        else:
            data |= {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}
            url = f"{gateway.url}/v1/completions"
            request = urllib.request.Request(url, json.dumps(data).encode(), headers | {"Idempotency-Key": self.name})
        reply: HTTPResponse = urllib.request.urlopen(request, timeout=120)
        return reply

    def read(self, stream: HTTPResponse) -> "Read":
        """Reads to the end, or to where the connection breaks."""
        texts, cached = [], None
        with stream, contextlib.suppress(HTTPException, OSError):
            for line in stream:
                if not line.startswith(b"data:") or b"[DONE]" in line:
                    continue
                document = json.loads(line.removeprefix(b"data:"))
                if self.events and document["type"] == EventType.TOKEN:
                    texts.append(document["data"]["text"])
                elif not self.events and document["choices"]:
                    texts.append(document["choices"][0]["text"])
                usage = document["data"].get("usage") if self.events else document.get("usage")
                if usage:
                    cached = usage["prompt_tokens_details"]["cached_tokens"]
        return Read("".join(texts), cached)


@dataclass
class Read:
    text: str
    cached_tokens: int | None  # of the prompt; None: the connection broke before the end

    @property
    def whole(self) -> bool:
        return self.cached_tokens is not None


def test_gateways_that_die_in_turn_break_their_own_streams_only_and_a_retry_gets_the_same_answer(
    published: Published, stages: list[FunctionProcess]
) -> None:
    """Each time the older of two gateways is killed and another one comes."""
    with ExitStack() as stack, ThreadPoolExecutor(2 * STREAMS) as threads:
        capacity = free(stages)
        environ = gateway_environment(published, [stage.url for stage in stages], LAMINA_API_KEYS=KEY)

        def start() -> FunctionProcess:
            return stack.enter_context(FunctionProcess(environ)).wait_ready()

        dies, stays = start(), start()
        broken, number = 0, 0
        while number < ROUNDS or broken < ROUNDS:
            assert number < 4 * ROUNDS, "answers end before their gateway is killed"
            clients = [Client(f"{number}-{index}", events=index % 2 == 0) for index in range(2 * STREAMS)]
            lost, others = clients[:STREAMS], clients[STREAMS:]
            gateways = [dies] * STREAMS + [stays] * STREAMS
            asked = list(threads.map(Client.ask, clients, gateways))
            reading = [threads.submit(client.read, stream) for client, stream in zip(clients, asked, strict=True)]
            dies.process.kill()
            read = {client.name: future.result(120) for client, future in zip(clients, reading, strict=True)}
            assert all(read[client.name].whole for client in others), "streams of the other gateway are untouched"
            broken += sum(not read[client.name].whole for client in lost)
            newest = start()
            for client in lost:
                again, elsewhere = (client.read(client.ask(gateway)) for gateway in (stays, newest))
                assert again.text == elsewhere.text, "the same answer at every gateway"
                assert again.text.startswith(read[client.name].text), "and the one whose beginning was read"
                assert again.cached_tokens, "the stages held the prompt's KV"
                assert elsewhere.cached_tokens
            dies, stays = stays, newest
            number += 1
        assert metric(stays, "lamina_gateway_replays_total") == 0
        wait_until(lambda: held(stages) == 0, FREED_SECONDS)
        wait_until(lambda: free(stages) == capacity)


def test_a_client_whose_connection_broke_joins_the_running_answer(published: Published, stages: list[FunctionProcess]) -> None:
    with running_gateway(published, stages, LAMINA_API_KEYS=KEY) as gateway:
        for client in (Client("a", events=True), Client("b", events=False)):
            client.ask(gateway).close()
            first = client.read(client.ask(gateway))
            assert first.whole
            assert client.read(client.ask(gateway)) == first, "kept after its end"
        tokens = metric(gateway, "lamina_gateway_tokens_total")
        assert tokens == 2 * DRAWN_TOKENS, "each was computed once"
