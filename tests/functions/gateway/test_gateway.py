"""A gateway process over three stage processes gives the whole model's answers."""

import http.client
import json
import os
import select
import signal
import socket
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from eventing.http.sse import SSEDecoder
from tests.support.functions.functions import FunctionProcess, gateway_environment, running_gateway, running_stages, wait_until
from tests.support.functions.metrics import metric
from tests.support.functions.scripted_gateway import EVENT
from tests.support.functions.server import reply
from tests.support.knative.kubernetes_watch import WatchServer
from tests.support.storage.published import CUT, Published, until_end
from tests.support.storage.tiny_models import greedy


def post(gateway: FunctionProcess, data: object, **headers: str) -> bytes:
    request = urllib.request.Request(gateway.url, json.dumps(data).encode(), EVENT | headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        body: bytes = response.read()
        return body


def expected_ids(published: Published, prompt_ids: list[int], count: int) -> list[int]:
    """Transformers' continuation, up to the end token."""
    return until_end(greedy(published.model, prompt_ids, count))


def test_answers_are_those_of_the_whole_model(gateway: FunctionProcess, published: Published) -> None:
    prompts = ["hello", "The capital of France is", "12345", "日本", "x" * 100, "the"]
    with ThreadPoolExecutor(len(prompts)) as executor:
        bodies = list(executor.map(lambda prompt: post(gateway, {"prompt": prompt, "max_tokens": 12}), prompts))
    for prompt, body in zip(prompts, bodies, strict=True):
        answer = json.loads(body)
        expected = expected_ids(published, published.tokenizer.encode(prompt).ids, 12)
        assert answer["token_ids"] == expected
        assert answer["text"] == published.tokenizer.decode(expected)
        assert answer["finish_reason"] == ("length" if len(expected) == 12 else "stop")


def test_a_streamed_answer_is_that_of_the_whole_model(gateway: FunctionProcess, published: Published) -> None:
    data = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 10}
    events = [json.loads(event.data) for event in SSEDecoder().feed(post(gateway, data, Accept="text/event-stream"))]
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    expected = expected_ids(published, published.tokenizer.encode(prompt, add_special_tokens=False).ids, 10)
    assert [event["data"]["token_id"] for event in events[:-1]] == expected
    assert "".join(event["data"]["text"] for event in events[:-1]) == events[-1]["data"]["text"]


def test_a_seed_repeats_an_answer(gateway: FunctionProcess) -> None:
    asked = {"prompt": "hello", "max_tokens": 12, "temperature": 1.0}
    first, again, other = (json.loads(post(gateway, asked | {"seed": seed}))["token_ids"] for seed in (1, 1, 2))
    assert first == again != other


def test_a_client_that_leaves_a_stream_frees_the_pipeline(gateway: FunctionProcess) -> None:
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 200, "ignore_eos": True, "stream": True}
    while 'lamina_gateway_answers_total{outcome="cancelled"}' not in metrics(gateway):  # on a busy machine it may end before
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        response.close()
        connection.close()
        wait_until(lambda: metric(gateway, "lamina_gateway_running_sequences") == 0)


def test_a_client_that_leaves_before_the_first_token_frees_the_pipeline(published: Published) -> None:
    """The stages accept connections and never reply. Nothing is sent before the first token, also not of a stream: a proxy that
    is still sending the request would break it off."""
    stream = {"Accept": "text/event-stream"}
    asked: list[tuple[str, dict[str, object], dict[str, str]]] = [
        ("/", {"prompt": "hello"}, {}),
        ("/v1/completions", {"model": "tiny", "prompt": "hello"}, {}),
        ("/", {"prompt": "hello"}, stream),
        ("/v1/completions", {"model": "tiny", "prompt": "hello", "stream": True}, {}),
    ]
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in CUT]
        urls = [f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
        gateway = stack.enter_context(FunctionProcess(gateway_environment(published, urls))).wait_ready()
        for path, body, headers in asked:
            connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
            connection.request("POST", path, json.dumps(body), EVENT | headers)
            wait_until(lambda: metric(gateway, "lamina_gateway_waiting_sequences") == 1)
            assert not select.select([connection.sock], [], [], 0.2)[0], "something was sent"
            connection.close()
            wait_until(lambda: metric(gateway, "lamina_gateway_waiting_sequences") == 0)
        assert 'lamina_gateway_answers_total{outcome="cancelled"} 4.0' in metrics(gateway)
        assert "open to everybody: neither LAMINA_API_KEYS nor" in gateway.log


def test_a_wrong_pod_network_is_no_outage(published: Published, stages: list[FunctionProcess]) -> None:
    """All addresses of the API are outside of it: requests go to the stages' Service URLs, and a warning is logged."""
    address = {"addresses": ["192.168.3.4"], "conditions": {"ready": True}}
    port = {"name": "http", "port": 8012}
    with WatchServer() as api:
        for stage in range(len(CUT)):
            labels = {"serving.knative.dev/service": f"s{stage}"}
            api.put({"metadata": {"name": f"slice-{stage}", "labels": labels}, "ports": [port], "endpoints": [address]})
        watch = {"LAMINA_KUBERNETES_API": api.url, "LAMINA_POD_NETWORK": "10.0.0.0/8"}
        names = {"LAMINA_STAGE_SERVICES": ",".join(f"s{k}" for k in range(len(CUT)))}
        with running_gateway(published, stages, **watch, **names) as gateway:
            answer = json.loads(post(gateway, {"prompt": "hello", "max_tokens": 6}))
            assert answer["token_ids"] == expected_ids(published, published.tokenizer.encode("hello").ids, 6)
            for first, last in CUT:
                assert f'lamina_gateway_refused_addresses{{stage="{first}:{last}"}} 1.0' in metrics(gateway)
            assert "no instance of s0 is in the pod network, 10.0.0.0/8 port 8012" in gateway.log


def metrics(gateway: FunctionProcess) -> str:
    text: str = gateway.get("/metrics")[1]
    return text


def test_the_gateway_has_metrics(gateway: FunctionProcess) -> None:
    post(gateway, {"prompt": "hello", "max_tokens": 3})
    text = metrics(gateway)
    for name in (
        'lamina_gateway_answers_total{outcome="length"}',
        "lamina_gateway_time_to_first_token_seconds_count",
        "lamina_gateway_inter_token_latency_seconds_count",
        "lamina_gateway_prompt_tokens_total",
        "lamina_gateway_tokens_total",
        "lamina_gateway_waiting_sequences 0.0",
        'lamina_gateway_stage_seconds_total{stage="2:4"}',
        "lamina_ready 1.0",
    ):
        assert name in text


def test_a_stream_is_finished_after_sigterm(published: Published, stages: list[FunctionProcess]) -> None:
    with running_gateway(published, stages) as gateway:
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
        connection.request(
            "POST", "/", json.dumps({"prompt": "the", "max_tokens": 60}), EVENT | {"Accept": "text/event-stream"}
        )
        response = connection.getresponse()
        first = response.readline()
        gateway.process.terminate()
        *_, last = SSEDecoder().feed(first + response.read())
        connection.close()
        assert json.loads(last.data)["type"] == "dev.lamina.generate.response"
        assert gateway.wait_end(30) == 0


@pytest.mark.parametrize(
    ("headers", "status", "says"),
    [
        ("Host: evil.example\r\nContent-Type: application/json", 421, "LAMINA_HOSTS"),
        ("Host: localhost\r\nContent-Type: application/json\r\nOrigin: https://evil.example", 403, "LAMINA_CORS_ORIGINS"),
        ("Host: localhost\r\nContent-Type: application/x-www-form-urlencoded", 415, "send Content-Type: application/json"),
        ("Host: localhost", 415, "send Content-Type: application/json"),
        ("Host: localhost\r\nContent-Type: application/json", 200, '"text_completion"'),
    ],
)
def test_a_page_of_another_site_is_told_why_it_is_refused(
    gateway: FunctionProcess, published: Published, headers: str, status: int, says: str
) -> None:
    body = json.dumps({"model": published.manifest.name, "prompt": "hello", "max_tokens": 1})
    head = f"POST /v1/completions HTTP/1.1\r\n{headers}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as sock:
        sock.sendall(head.encode() + body.encode())
        seen = reply(sock).decode()
    assert seen.startswith(f"HTTP/1.1 {status} ")
    assert says in seen
    assert "Content-Type: application/json" in seen


def test_the_server_as_a_whole_has_options(gateway: FunctionProcess) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as sock:
        sock.sendall(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        seen = reply(sock)
    assert seen.startswith(b"HTTP/1.1 204 ")
    assert b"\r\nAllow: DELETE, GET, HEAD, OPTIONS, POST\r\n" in seen
    assert b"Content-Length" not in seen  # RFC 9110, section 8.6
    assert seen.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("drain_seconds", ["60", "1"])
def test_sigterm_breaks_no_stream_that_ends_within_the_drain_and_the_others_are_told(
    published: Published, drain_seconds: str
) -> None:
    """With the short drain a stage is suspended, so that no answer goes on."""
    asked = json.dumps({"prompt": "the", "max_tokens": 200 if drain_seconds == "1" else 60, "ignore_eos": True})
    with ExitStack() as stack:
        stages = stack.enter_context(running_stages(published))
        gateway = stack.enter_context(running_gateway(published, stages, LAMINA_DRAIN_SECONDS=drain_seconds))
        streams, seen = [], []
        for number in range(64):
            connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
            stack.callback(connection.close)
            connection.request("POST", "/", asked, EVENT | {"ce-id": f"{number}", "Accept": "text/event-stream"})
            streams.append(connection)
        replies = [connection.getresponse() for connection in streams]  # each has begun
        if drain_seconds == "1":
            os.kill(stages[1].process.pid, signal.SIGSTOP)
            stack.callback(os.kill, stages[1].process.pid, signal.SIGCONT)
        gateway.process.terminate()
        for reply in replies:
            *_, last = SSEDecoder().feed(reply.read())
            seen.append(json.loads(last.data))
        assert gateway.wait_end(60) == 0
    whole = [event for event in seen if event["type"] == "dev.lamina.generate.response"]
    broken = [event["data"]["detail"] for event in seen if event["type"] == "dev.lamina.generate.error"]
    assert len(whole) + len(broken) == 64
    assert bool(broken) == (drain_seconds == "1")
    assert all("shutting down" in detail for detail in broken)


# A gateway that waits half a second for a client to read, and not ten.
_HASTY = """
import functools, os
import functions.hosting.server
from functions.hosting import connection
connection.ServerLimits = functools.partial(connection.ServerLimits, transfer_seconds=0.5, slowest_bytes_per_second=1e9)
from functions.__main__ import main
os._exit(main([], os.environ))
"""


def test_a_client_that_reads_nothing_of_its_stream_frees_the_stages(
    published: Published, stages: list[FunctionProcess]
) -> None:
    asked = {"model": "tiny", "prompt": "the", "max_tokens": 200, "n": 16, "logprobs": 5, "stream": True, "ignore_eos": True}
    body = json.dumps(asked).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    environ = gateway_environment(published, [stage.url for stage in stages])
    with FunctionProcess(environ, ("-c", _HASTY)) as gateway, socket.socket() as sock:
        gateway.wait_ready()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", gateway.port))
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: 'lamina_gateway_answers_total{outcome="cancelled"}' in metrics(gateway), 60)
        wait_until(lambda: metric(gateway, "lamina_gateway_running_sequences") == 0)
        wait_until(lambda: all(metric(stage, "lamina_stage_sequences") == 0 for stage in stages))
