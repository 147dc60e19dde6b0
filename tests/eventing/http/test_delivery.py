"""The sender over real sockets: kept connections, timeouts, and every way in which an exchange can fail.

The last part reads replies from a socket pair, piece by piece.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest

from eventing.http.delivery import (
    BadReply,
    ConnectionBroken,
    ConnectionPool,
    DeliveryTimeout,
    HttpReply,
    InfrastructureError,
    Origin,
    RequestTarget,
    Sender,
    Unreachable,
    exchange,
    request_head,
)
from eventing.problems import PROBLEM_CONTENT_TYPE, MalformedEvent, NotReady, WrongPipeline
from knative.local.kubelet.processes import free_port
from tests.support.http_server import Exchange, serving


@pytest.fixture
def sender() -> Iterator[Sender]:
    with closing(Sender(connect_timeout_seconds=1.0, max_connections_per_host=8)) as sender:
        yield sender


def _echo(exchange: Exchange) -> None:
    exchange.answer(200, exchange.body, Content_Type="text/plain", Ce_Instance="pod-1/ab")


def test_body_and_headers_arrive_and_come_back(sender: Sender) -> None:
    pieces = [b"abc", memoryview(b"def"), b"", memoryview(bytes(range(256)))]
    with serving(_echo) as server:
        reply = sender.send(server.url + "path?x=1", {"ce-id": "7", "Authorization": "Bearer t"}, pieces, 60)
        request = server.requests[0]
    assert reply.status == 200
    assert bytes(reply.body) == b"abcdef" + bytes(range(256))
    assert not reply.body.readonly
    assert reply.headers["ce-instance"] == "pod-1/ab"
    assert request.path == "/path?x=1"
    assert request.headers["ce-id"] == "7"
    assert request.headers["Authorization"] == "Bearer t"
    assert request.headers["Content-Length"] == str(6 + 256)
    assert request.headers["Transfer-Encoding"] is None
    assert request.headers["Accept-Encoding"] == "identity"


def test_headers_that_hide_a_request_from_the_autoscaler_are_never_sent(sender: Sender) -> None:
    hidden = {"K-Proxy-Request": "activator", "k-kubelet-probe": "queue", "User-Agent": "kube-probe/1.36", "Host": "x"}
    with serving(_echo) as server:
        sender.send(server.url, hidden, [], 60)
        headers = server.requests[0].headers
    assert headers["K-Proxy-Request"] is None
    assert headers["K-Kubelet-Probe"] is None
    assert headers.get_all("User-Agent") == ["lamina"]
    assert headers.get_all("Host") == [server.url[7:-1]]


def test_connections_are_used_again(sender: Sender) -> None:
    with serving(_echo) as server:
        for _ in range(20):
            sender.send(server.url, {}, [b"x"], 60)
        assert server.connections == 1


def test_threads_share_no_connection_and_no_more_than_allowed_are_open(sender: Sender) -> None:
    with serving(_echo) as server, ThreadPoolExecutor(32) as threads:
        bodies = [str(number).encode() * 1000 for number in range(400)]
        replies = list(threads.map(lambda body: sender.send(server.url, {}, [body], 20), bodies))
        assert [bytes(reply.body) for reply in replies] == bodies
        assert server.connections <= 8


def test_a_connection_closed_while_idle_is_not_used_again(sender: Sender) -> None:
    def answer_and_close(exchange: Exchange) -> None:
        _echo(exchange)
        exchange.close_connection = True  # without saying so: what a server does when its keep-alive time is over

    with serving(answer_and_close) as server:
        for _ in range(5):
            sender.send(server.url, {}, [b"x"], 60)
            _wait_until_dropped(sender, server.url)
        assert server.connections == 5


def _wait_until_dropped(sender: Sender, url: str) -> None:
    """Waits for the FIN, which may arrive after the reply."""
    connection = sender._pool.take(RequestTarget.of(url).origin, 1)
    if connection.sock is not None:
        connection.sock.settimeout(5)
        assert connection.sock.recv(1, socket.MSG_PEEK) == b""
    sender._pool.give_back(connection, keep=True)


def test_connection_close_is_obeyed(sender: Sender) -> None:
    with serving(lambda exchange: exchange.answer(200, b"bye", Connection="close")) as server:
        assert [bytes(sender.send(server.url, {}, [b"x"], 60).body) for _ in range(3)] == [b"bye"] * 3
        assert server.connections == 3


def test_a_body_of_40_megabytes_each_way(sender: Sender) -> None:
    body = memoryview(bytes(40 * 2**20))
    with serving(_echo) as server:
        reply = sender.send(server.url, {}, [b"head", body], 60)
    assert len(reply.body) == len(body) + 4


def test_a_chunked_reply_and_one_that_ends_with_the_connection(sender: Sender) -> None:
    def chunked(exchange: Exchange) -> None:
        exchange.send_response(200)
        exchange.send_header("Transfer-Encoding", "chunked")
        exchange.end_headers()
        exchange.wfile.write(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")

    def until_close(exchange: Exchange) -> None:
        exchange.send_response(200)
        exchange.end_headers()
        exchange.wfile.write(b"until the end")
        exchange.close_connection = True

    with serving(chunked) as server:
        assert [bytes(sender.send(server.url, {}, [], 60).body) for _ in range(2)] == [b"abcde"] * 2
        assert server.connections == 1
    with serving(until_close) as server:
        assert bytes(sender.send(server.url, {}, [], 60).body) == b"until the end"


def test_a_refused_connection_is_unreachable(sender: Sender) -> None:
    url = f"http://127.0.0.1:{free_port()}/"
    with pytest.raises(Unreachable, match=rf"{url}.*refused"):
        sender.send(url, {}, [b"x"], 60)
    with pytest.raises(Unreachable, match="no connection"):
        sender.send("http://does-not-exist.invalid/", {}, [b"x"], 60)


def test_tls_is_verified() -> None:
    with serving(_echo) as server, closing(Sender()) as sender, pytest.raises(Unreachable, match="no connection"):
        sender.send(server.url.replace("http:", "https:"), {}, [], 60)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "127.0.0.1:8080", "http://"])
def test_an_invalid_url_is_named(sender: Sender, url: str) -> None:
    with pytest.raises(ValueError, match=url):
        sender.send(url, {}, [], 60)


def _announced(exchange: Exchange, length: int) -> None:
    """Sends half of a body of 100 bytes at most, and closes the connection."""
    exchange.send_response(200)
    exchange.send_header("Content-Length", str(length))
    exchange.end_headers()
    exchange.wfile.write(bytes(50 if length == 100 else 0))
    exchange.close_connection = True


def _trickle(exchange: Exchange) -> None:
    exchange.send_response(200)
    exchange.send_header("Transfer-Encoding", "chunked")
    exchange.end_headers()
    try:
        while not exchange.server.released.wait(0.05):
            exchange.wfile.write(b"1\r\nx\r\n")
    except OSError:
        exchange.close_connection = True


def _silence(exchange: Exchange) -> None:
    exchange.server.released.wait(30)


@pytest.mark.parametrize(
    ("respond", "error", "seen"),
    [
        (Exchange.reset, ConnectionBroken, "the connection broke"),
        (partial(_announced, length=100), ConnectionBroken, "50 more expected"),
        (lambda exchange: exchange.wfile.write(b"SSH-2.0-OpenSSH\r\n"), ConnectionBroken, "SSH-2"),
        (partial(_announced, length=2**31), InfrastructureError, "answered 200: a body of 2147483648 bytes, the most"),
    ],
    ids=["reset", "half a body", "not HTTP", "too large"],
)
def test_a_broken_reply_raises_after_one_attempt(
    sender: Sender, respond: Callable[[Exchange], None], error: type[Exception], seen: str
) -> None:
    with serving(respond) as server:
        with pytest.raises(error, match=f"{server.url}.*{seen}"):
            sender.send(server.url, {}, [b"x"], 60)
        server.respond = _echo
        assert bytes(sender.send(server.url, {}, [b"again"], 60).body) == b"again"
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("respond", "size"), [(_silence, 1), (_trickle, 1), (_silence, 64 * 2**20)], ids=["no reply", "slow reply", "slow reader"]
)
def test_the_timeout_bounds_the_whole_exchange(sender: Sender, respond: Callable[[Exchange], None], size: int) -> None:
    with serving(respond) as server:
        server.read_bodies = size == 1
        began = time.monotonic()
        with pytest.raises(DeliveryTimeout, match=server.url):
            sender.send(server.url, {}, [memoryview(bytes(size))], 0.3)
        assert time.monotonic() - began < 30


def test_waiting_for_a_free_connection_is_bounded() -> None:
    with serving(lambda exchange: None) as server, closing(Sender(max_connections_per_host=1)) as sender:
        entered = threading.Event()

        def hold(exchange: Exchange) -> None:
            entered.set()
            server.released.wait(30)
            exchange.answer(200)

        server.respond = hold
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(sender.send, server.url, {}, [], 20)
            assert entered.wait(60)
            with pytest.raises(Unreachable, match="all 1 connections"):
                sender.send(server.url, {}, [], 0.1)
            server.released.set()
            assert first.result().status == 200


def test_problem_documents_become_the_class_that_was_raised(sender: Sender) -> None:
    problem = WrongPipeline("event of abc, this is def")
    with (
        serving(lambda exchange: exchange.answer(421, problem.document(), Content_Type=PROBLEM_CONTENT_TYPE)) as server,
        pytest.raises(WrongPipeline, match="event of abc, this is def") as raised,
    ):
        sender.send(server.url, {}, [b"x"], 60)
    assert server.url in raised.value.__notes__[0]


@pytest.mark.parametrize(
    ("status", "body", "content_type", "excerpt"),
    [
        (502, b"connection refused\n to 127.0.0.1:8080", "text/plain", "connection refused to 127.0.0.1:8080"),
        (404, b"", "text/html", "no text"),
        (503, b'{"type": "about:blank", "detail": "busy"}', PROBLEM_CONTENT_TYPE, "about:blank"),
        (500, b"\xff\xfe not problem", PROBLEM_CONTENT_TYPE, "not problem"),
        (307, b"elsewhere", "text/plain", "elsewhere"),
        (400, MalformedEvent("x").document(), "application/json", "urn:lamina"),
    ],
)
def test_other_refusals_are_the_infrastructures(
    sender: Sender, status: int, body: bytes, content_type: str, excerpt: str
) -> None:
    with (
        serving(lambda exchange: exchange.answer(status, body, Content_Type=content_type)) as server,
        pytest.raises(InfrastructureError, match=excerpt) as raised,
    ):
        sender.send(server.url, {}, [b"x"], 60)
    assert raised.value.status == status
    assert raised.value.url == server.url
    assert server.connections == 1


def test_a_refusal_while_the_body_is_still_being_sent(sender: Sender) -> None:
    def refuse(exchange: Exchange) -> None:
        exchange.answer(413, b"too large", Connection="close")
        exchange.connection.shutdown(socket.SHUT_WR)
        while exchange.connection.recv(2**20):  # A polite server: it reads on, so that no RST overtakes its answer.
            pass

    with serving(refuse) as server:
        server.read_bodies = False
        with pytest.raises(InfrastructureError, match="answered 413: too large"):
            sender.send(server.url, {}, [memoryview(bytes(32 * 2**20))], 20)


NOT_READY = (503, NotReady("loading").document(), {"Content_Type": PROBLEM_CONTENT_TYPE})


def test_send_makes_one_attempt(sender: Sender) -> None:
    attempts: list[str] = []

    def fail(exchange: Exchange, *, how: str) -> None:
        attempts.append(how)
        if how == "reset":
            exchange.reset()
        else:
            status, body, headers = NOT_READY if how == "not ready" else (503, b"", {"Retry_After": "0"})
            exchange.answer(status, body, **headers)

    for how, raised in (("reset", ConnectionBroken), ("not ready", NotReady), ("busy", InfrastructureError)):
        with serving(partial(fail, how=how)) as server, pytest.raises(raised):
            sender.send(server.url, {}, [b"x"], 60)
    assert attempts == ["reset", "not ready", "busy"]


def test_nothing_is_sent_once_closed(sender: Sender) -> None:
    with serving(lambda exchange: exchange.answer(200, b"")) as server:
        sender.send(server.url, {}, [b"x"], 60)
        sender.close()
        with pytest.raises(Unreachable, match="closed"):
            sender.send(server.url, {}, [b"x"], 60)
        assert len(server.requests) == 1


def test_unused_hosts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventing.http.delivery._LOOK_SECONDS", 0.0)
    pool = ConnectionPool(max_connections_per_host=2)
    for port in range(1, 50):
        connection = pool.take(Origin(False, "127.0.0.1", port), 1)
        assert connection.sock is None
        pool.give_back(connection, keep=True)
    until = time.monotonic() + 20
    while pool._hosts and time.monotonic() < until:
        time.sleep(0.01)
    assert not pool._hosts


@pytest.mark.slow
def test_connections_of_a_burst_are_closed_though_their_host_is_asked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single requests take the connection that was used last and never look at the others."""
    monkeypatch.setattr("eventing.http.delivery.IDLE_SECONDS", 0.5)
    monkeypatch.setattr("eventing.http.delivery._LOOK_SECONDS", 0.1)
    everyone = threading.Barrier(8)

    def together(exchange: Exchange) -> None:
        if exchange.path == "/burst":
            everyone.wait(20)
        exchange.answer(200, b"")

    with closing(Sender(connect_timeout_seconds=1.0, max_connections_per_host=8)) as sender, serving(together) as server:
        with ThreadPoolExecutor(8) as clients:
            list(clients.map(lambda _: sender.send(server.url + "burst", {}, [], 20), range(8)))
        (host,) = sender._pool._hosts.values()
        assert len(host.idle) == 8
        until = time.monotonic() + 20
        while len(host.idle) > 1 and time.monotonic() < until:
            sender.send(server.url, {}, [], 60)
        assert len(host.idle) == 1
        assert server.connections == 8
        while sender._pool._hosts and time.monotonic() < until:  # nothing is sent any more
            time.sleep(0.01)
        assert not sender._pool._hosts


ROOT = RequestTarget.of("http://127.0.0.1/")
HEAD = request_head(ROOT, {"Content-Length": "1"})


def answered(*pieces: bytes, closes: bool = False) -> HttpReply:
    """The reply that `exchange` reads from pieces that arrive one by one."""
    here, there = socket.socketpair()
    with here, there:

        def answer() -> None:
            there.recv(2**16)
            for piece in pieces:
                there.sendall(piece)
                time.sleep(0.01)
            if closes:
                there.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            return exchange(here, HEAD, [b"x"], time.monotonic() + 2)
        finally:
            thread.join()


@pytest.mark.slow
def test_a_reply_may_come_byte_by_byte() -> None:
    said = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nCE-Id: 7\r\n\r\nabc"
    reply = answered(*(said[index : index + 1] for index in range(len(said))))
    assert (reply.status, reply.headers["ce-id"], bytes(reply.body), reply.keeps) == (200, "7", b"abc", True)


def test_an_interim_reply_is_passed_over() -> None:
    reply = answered(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n", b"HTTP/1.1 204 No\r\n\r\n")
    assert (reply.status, reply.headers, bytes(reply.body), reply.keeps) == (204, {}, b"", True)


@pytest.mark.parametrize("head", [b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 200 OK\r\nConnection: close\r\n"])
def test_a_reply_that_ends_the_connection_says_so(head: bytes) -> None:
    assert not answered(head + b"Content-Length: 1\r\n\r\na").keeps


def test_a_connection_that_says_more_than_it_was_asked_is_not_used_again() -> None:
    reply = answered(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nabc")
    assert (bytes(reply.body), reply.keeps) == (b"a", False)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"", "closed without a reply"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "no HTTP reply, but"),
        (b"HTTP/1.1 two hundred\r\n\r\n", "two hundred"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", "closed after 3 bytes, 2 more expected"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", "closed after 3 bytes, before the last chunk"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", "the most is"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**17, "no HTTP reply, but"),
    ],
)
def test_an_incomplete_or_invalid_reply_is_refused(reply: bytes, said: str) -> None:
    with pytest.raises(BadReply, match=said):
        answered(reply, closes=True)


@pytest.mark.parametrize("given", [("/", {"ce-id": "1\r\nevil: 1"}), ("/", {"a\nb": "c"}), ("/a b", {}), ("/\r\n", {})])
def test_nothing_breaks_out_of_its_line(given: tuple[str, dict[str, str]]) -> None:
    path, headers = given
    with pytest.raises(ValueError, match="line break"):
        request_head(replace(ROOT, path=path), headers)
