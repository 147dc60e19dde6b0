"""A request's memory, and its share of the budget of bodies, are free when the request is over, without the garbage collector.

Real functions, in which the collector never runs, get one request again and again. Bodies that an application receives itself
may have any length, in bounded memory, under the budget of all bodies.
"""

import contextlib
import hashlib
import itertools
import json
import socket
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import MappingProxyType

import pytest

from eventing.http.binding import to_binary_http
from eventing.wire.batch_codec import encode_batch
from eventing.wire.cloud_event import make_event
from eventing.wire.events import BATCH_CONTENT_TYPE, Attribute, Batch, EventType, Row, Tensor
from functions.hosting.requests import STREAMED_BODY_BYTES
from knative.local.kubelet.processes import memory_bytes
from tests.support.functions.functions import TOKEN, FunctionProcess, gateway_environment, stage_environment, wait_until
from tests.support.functions.server import ENOUGH, Serving, half_sent, reply, serving
from tests.support.storage.published import CUT, Published

BODY_BYTES = 8 * 2**20 - 1024  # eight of them are the whole budget
TIMES = 12  # more than the budget allows if earlier bodies still count

# Functions without a collector, and with handlers that fail on demand.
_FUNCTION = """
import gc, os
gc.disable()
gc.enable = lambda: None
import functions.stage.serving.function
from functions.__main__ import main
from functions.gateway.answers.service import AnswerService
from functions.stage.engine.forward_pass import ForwardPass
functions.stage.serving.function._REQUEST_BYTES = 2**26
begin = AnswerService.begin
def begin_or_fail(service, request, context):
    if request.prompt.startswith("fail"):
        raise ZeroDivisionError
    return begin(service, request, context)
AnswerService.begin = begin_or_fail
run = ForwardPass.run
def run_or_fail(forward_pass, events):
    if any(row.id == "fail" for event in events for row in event.batch.rows):
        raise ZeroDivisionError
    return run(forward_pass, events)
ForwardPass.run = run_or_fail
os._exit(main([], os.environ))
"""


def post(path: str, body: bytes, **headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def completion(prompt: str = "hello", headers: Mapping[str, str] = MappingProxyType({}), **fields: object) -> bytes:
    """Padded with blanks, which JSON ignores."""
    body = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 1} | fields).encode()
    return post("/v1/completions", body.ljust(BODY_BYTES), content_type="application/json", **headers)


EVENT = {"ce_specversion": "1.0", "ce_id": "1", "ce_source": "/client", "ce_type": "dev.lamina.generate.request"}
CHUNKS = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"%x\r\n" % (2 * BODY_BYTES)
)
STRUCTURED = json.dumps({name.removeprefix("ce_"): value for name, value in EVENT.items()} | {"data": {"prompt": "hello"}})
ASKED = {
    "completion": completion(),
    "completion with a key": completion(headers={"Idempotency-Key": "the same"}),
    "event": post("/", b'{"prompt": "hello"}'.ljust(BODY_BYTES), content_type="application/json", **EVENT),
    "structured event": post("/", STRUCTURED.encode().ljust(BODY_BYTES), content_type="application/cloudevents+json"),
    "batch of events": post(
        "/", f"[{STRUCTURED}]".encode().ljust(BODY_BYTES), content_type="application/cloudevents-batch+json"
    ),
}
# What is sent, and the status of the reply; 0: the client leaves when all is sent.
GATEWAY_CASES = {
    "another model": (completion(model="another"), 404),
    "no JSON": (completion().replace(b"}", b"{"), 400),
    "no data of an event": (post("/", b"{".ljust(BODY_BYTES), content_type="application/json", **EVENT), 400),
    "a value that is not served": (completion(max_tokens=-1), 400),
    "chunks beyond the limit": (CHUNKS + bytes(2 * BODY_BYTES), 413),
    "an error in the handler": (completion("fail" + "x" * (BODY_BYTES - 1000)), 500),
    "an error in the handler of an event": (
        post("/", b'{"prompt": "fail"}'.ljust(BODY_BYTES), content_type="application/json", **EVENT),
        500,
    ),
    "the client leaves while it sends": (completion()[:-1], 0),
    "the client leaves while it sends a chunk": (CHUNKS + bytes(BODY_BYTES), 0),
}


@pytest.fixture(scope="module")
def gateway(published: Published) -> Iterator[FunctionProcess]:
    """Its stages accept connections and never reply."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in CUT]
        urls = [f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
        environ = gateway_environment(published, urls)
        yield stack.enter_context(FunctionProcess(environ, ("-c", _FUNCTION))).wait_ready()


@pytest.fixture(scope="module")
def stage(published: Published) -> Iterator[FunctionProcess]:
    """The second of its pipeline, which gets tensors."""
    with FunctionProcess(stage_environment(published, 1), ("-c", _FUNCTION)) as started:
        yield started.wait_ready()


def ask(function: FunctionProcess, data: bytes, *, stays: bool = True) -> bytes:
    """Sends `data` and returns the reply; leaves without it if not `stays`."""
    with socket.create_connection(("127.0.0.1", function.port), timeout=60) as sock:
        with contextlib.suppress(ConnectionError):  # a refused body is not read to its end
            sock.sendall(data)
        return reply(sock) if stays else b""


def check_memory_returns(function: FunctionProcess, once: Callable[[], None], times: int = TIMES) -> None:
    once()
    before = memory_bytes(function.process.pid)
    for _ in range(times):
        once()
    wait_until(lambda: memory_bytes(function.process.pid) < before + 4 * BODY_BYTES)


def check_case(function: FunctionProcess, data: bytes, status: int, times: int = TIMES) -> None:
    def once() -> None:
        seen = ask(function, data, stays=status > 0)
        assert seen[9:12] == (b"%d" % status if status else b""), seen[:300]

    check_memory_returns(function, once, times)


@pytest.mark.parametrize("case", GATEWAY_CASES)
def test_a_gateway_frees_a_body_at_once(gateway: FunctionProcess, case: str) -> None:
    check_case(gateway, *GATEWAY_CASES[case])
    check_case(gateway, completion(model="another"), 404, 1)


@pytest.mark.parametrize("case", ASKED)
def test_a_gateway_keeps_no_body_of_an_answer_in_hand(gateway: FunctionProcess, case: str) -> None:
    """Each client waits for an answer that does not come, and at last all leave."""
    with ExitStack() as stack:

        def once() -> None:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port), timeout=60))
            sock.sendall(ASKED[case])

        check_memory_returns(gateway, once)
    check_case(gateway, completion(model="another"), 404, 1)


@pytest.mark.parametrize(
    ("method", "path", "length", "status"),
    [
        (b"POST", b"/nothing", 0, b"404"),
        (b"GET", b"/nothing", 0, b"404"),
        (b"GET", b"/v1/completions", 0, b"405"),
        (b"POST", b"/v1/completions", 2**30, b"413"),
    ],
)
def test_a_gateway_frees_the_head_of_a_refusal_at_once(
    gateway: FunctionProcess, method: bytes, path: bytes, length: int, status: bytes
) -> None:
    lines = [b"%b %b HTTP/1.1" % (method, path), b"Host: localhost", b"Connection: close", b"Content-Type: application/json"]
    lines += [b"Content-Length: %d" % length, b"X-Large: " + b"x" * 60_000]
    check_case(gateway, b"\r\n".join([*lines, b"", b""]), int(status), 700)


def event(published: Published, body: bytes, **changes: str) -> bytes:
    attributes = {Attribute.PIPELINE: published.fingerprint(), Attribute.LAYER: CUT[1][0]}
    headers, _ = to_binary_http(make_event(EventType.FORWARD, "/test", b"", BATCH_CONTENT_TYPE, **(attributes | changes)))
    return post("/", body, authorization=f"Bearer {TOKEN}", **headers)


def batch(row_id: str, width: int) -> bytes:
    length = BODY_BYTES // 4 // (width + 1) - 64
    hidden = Tensor("F32", (length, width), memoryview(bytes(4 * length * width)))
    return b"".join(encode_batch(Batch((Row(row_id, 0, 0, length),), memoryview(array("i", [5] * length)), hidden)))


STAGE_CASES = {
    "no batch": (lambda published: event(published, bytes(BODY_BYTES)), 400),
    "another pipeline": (lambda published: event(published, bytes(BODY_BYTES), pipeline="0" * 32), 421),
    "a tensor too wide": (lambda published: event(published, batch("wide", 64)), 400),
    "a pass that fails": (lambda published: event(published, batch("fail", 32)), 500),
    "the sender leaves": (lambda published: event(published, bytes(BODY_BYTES))[:-1], 0),
}


@pytest.mark.parametrize("case", STAGE_CASES)
def test_a_stage_frees_an_event_at_once(stage: FunctionProcess, published: Published, case: str) -> None:
    make, status = STAGE_CASES[case]
    check_case(stage, make(published), status)
    check_case(stage, event(published, bytes(BODY_BYTES)), 400, 1)


PIECE = bytes(range(256)) * 2**10
PIECES = 256
LENGTH = len(PIECE) * PIECES  # 64 MiB
LIMIT = 2**27
HEAD = b"POST /streamed HTTP/1.1\r\nHost: localhost\r\n"
WITH_LENGTH = HEAD + b"Content-Length: %d\r\n\r\n"
IN_CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(PIECE), PIECE)


def answer(server: Serving, pieces: Iterable[bytes]) -> bytes:
    with server.connect() as sock:
        for piece in pieces:
            sock.sendall(piece)
        return reply(sock)


@pytest.mark.parametrize(
    "pieces",
    [(WITH_LENGTH % LENGTH, *itertools.repeat(PIECE, PIECES)), (IN_CHUNKS, *itertools.repeat(CHUNK, PIECES), b"0\r\n\r\n")],
    ids=["length", "chunks"],
)
def test_a_long_body_is_received_whole_in_little_memory(pieces: Iterable[bytes]) -> None:
    digest = hashlib.sha256(PIECE * PIECES).hexdigest().encode()
    with serving(4, body_bytes=LIMIT, request_bytes=STREAMED_BODY_BYTES) as server:
        answer(server, [WITH_LENGTH % 1, b"x"])
        before = memory_bytes(server.process.pid)
        for _ in range(2):  # its share of the budget is given back
            answered = answer(server, pieces)
            assert answered.startswith(b"HTTP/1.1 200 ")
            assert answered.endswith(digest)
        assert memory_bytes(server.process.pid) < before + LENGTH / 4


def test_a_client_that_waits_for_it_is_told_to_go_on() -> None:
    with serving(4) as server, server.connect() as sock:
        sock.sendall(HEAD + b"Content-Length: 1\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(2**16).startswith(b"HTTP/1.1 100 ")
        sock.sendall(b"x")
        assert reply(sock).endswith(hashlib.sha256(b"x").hexdigest().encode())


@pytest.mark.parametrize(
    ("pieces", "seconds", "status", "said"),
    [
        ((WITH_LENGTH % (2**20 + 1),), ENOUGH, 503, b"EventTooLarge"),
        ((IN_CHUNKS, *itertools.repeat(CHUNK, 5)), ENOUGH, 413, b"more than 1048576 bytes"),
        ((IN_CHUNKS, b"1\r\nx\r\nno number\r\n"), ENOUGH, 400, b"no HTTP/1.1"),
        ((WITH_LENGTH % 10, b"x"), 1.0, 400, b"too slowly: 1 bytes"),
    ],
    ids=["announced too long", "too long", "no chunks", "slow"],
)
def test_what_is_no_body_is_refused(pieces: Iterable[bytes], seconds: float, status: int, said: bytes) -> None:
    with serving(4, transfer_seconds=seconds, request_bytes=STREAMED_BODY_BYTES) as server:
        for _ in range(2):  # its share of the budget is given back
            answered = answer(server, pieces)
            assert answered.startswith(b"HTTP/1.1 %d " % status)
            assert said in answered


def test_bodies_on_their_way_count_until_their_clients_leave() -> None:
    with serving(8, request_bytes=2 * STREAMED_BODY_BYTES) as server:
        with half_sent(server, 2, WITH_LENGTH % 10 + b"x") as opened:
            assert b"Overloaded" in answer(server, [WITH_LENGTH % 1, b"x"])
            for sock in opened:
                sock.shutdown(socket.SHUT_WR)
                assert b"the client has left after 1 bytes" in reply(sock)
        assert answer(server, [WITH_LENGTH % 1, b"x"]).startswith(b"HTTP/1.1 200 ")
