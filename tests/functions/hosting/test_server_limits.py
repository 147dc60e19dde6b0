"""Limits of the server: half-sent requests, stalled readers, too many connections, too many bytes."""

import contextlib
import resource
import select
import socket
import time
from contextlib import ExitStack

import pytest

from tests.support.functions.server import ENOUGH, half_sent, reply, serving

HALF_A_HEAD = b"POST / HTTP/1.1\r\nHost: he"
HALF_A_BODY = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\nhello"
HALF_A_CHUNK = b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\nhello"


@pytest.mark.parametrize("begun", [b"", HALF_A_HEAD, HALF_A_BODY, HALF_A_CHUNK], ids=["nothing", "head", "body", "chunk"])
def test_half_sent_requests_hold_no_thread(begun: bytes) -> None:
    with serving(2, head_seconds=ENOUGH, transfer_seconds=ENOUGH) as server, half_sent(server, 80, begun):
        assert server.get("/").startswith(b"request-")
        assert server.get("/healthz") == b"probe"


def test_probes_are_answered_while_every_thread_is_held() -> None:
    with serving(2) as server, ExitStack() as stack:
        held = [stack.enter_context(server.connect()) for _ in range(40)]
        for sock in held:
            sock.sendall(b"GET /hold HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        for path in ("/healthz", "/readyz"):
            assert server.get(path) == b"probe"
        with socket.create_connection(("127.0.0.1", server.management_port), timeout=ENOUGH) as sock:
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n")
            assert reply(sock).endswith(b"management")


@pytest.mark.slow
@pytest.mark.parametrize("begun", [HALF_A_HEAD, HALF_A_BODY, HALF_A_CHUNK], ids=["head", "body", "chunk"])
def test_a_request_that_does_not_go_on_is_told_so(begun: bytes) -> None:
    with (
        serving(2, head_seconds=1.0, transfer_seconds=1.0, linger_seconds=0.1) as server,
        half_sent(server, 1, begun) as (sock,),
    ):
        assert reply(sock).startswith(b"HTTP/1.1 408 Request Timeout")


@pytest.mark.slow
def test_a_connection_without_a_request_is_closed() -> None:
    with serving(2, head_seconds=0.1) as server, server.connect() as sock:
        assert reply(sock) == b""


def test_a_client_that_reads_nothing_ends_its_stream() -> None:
    """The server closes the application's generator, which frees the thread."""
    with serving(2, transfer_seconds=0.1, slowest_bytes_per_second=1e9) as server, server.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(b"GET /stream HTTP/1.1\r\nHost: here\r\n\r\n")
        assert server.get("/gone").startswith(b"request-")


def test_little_of_a_stream_that_is_not_read_waits_in_the_kernel() -> None:
    """All of it would fit there, and its end would not wait for the client."""
    with serving(2, transfer_seconds=0.1, slowest_bytes_per_second=1e9) as server, server.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(b"GET /megabyte HTTP/1.1\r\nHost: here\r\n\r\n")
        assert server.get("/gone").startswith(b"request-")


def test_the_time_to_read_a_stream_counts_over_all_its_pieces() -> None:
    """Each piece is read in less than the time that is allowed for all."""
    with serving(2, transfer_seconds=2.0, slowest_bytes_per_second=1e9) as server, server.connect() as sock:
        sock.sendall(b"GET /stream HTTP/1.1\r\nHost: here\r\n\r\n")
        for _ in range(200):
            time.sleep(0.25)
            with contextlib.suppress(ConnectionResetError):
                if sock.recv(2**20, socket.MSG_WAITALL):
                    continue
            break
        else:
            pytest.fail("the stream goes on")
        assert server.get("/gone").startswith(b"request-")


def test_a_stream_may_be_slower_than_its_client() -> None:
    """Only time in which the client does not read counts."""
    with serving(2, transfer_seconds=0.1, slowest_bytes_per_second=1e9) as server:
        assert server.get("/slow-stream") == b"." * 10


def test_an_application_can_ask_whether_its_client_is_gone() -> None:
    with serving(2) as server:
        with server.connect() as sock:
            sock.sendall(b"GET /until-gone HTTP/1.1\r\nHost: here\r\n\r\n")
        assert server.get("/gone").startswith(b"request-")


def test_the_connection_that_waited_longest_is_closed_for_a_new_one() -> None:
    with serving(2, waiting_connections=20, head_seconds=ENOUGH) as server, half_sent(server, 60, HALF_A_HEAD) as opened:
        assert server.get("/").startswith(b"request-")
        assert reply(opened[0]) == b""


def test_a_server_out_of_file_descriptors_closes_waiting_connections() -> None:
    with serving(2, head_seconds=ENOUGH) as server:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (40, 40))
        with half_sent(server, 80, HALF_A_HEAD):
            assert server.get("/").startswith(b"request-")


def test_complete_requests_that_wait_for_a_thread_are_bounded() -> None:
    """Two are in hand and 256 wait. The next gets 503, and probes are still answered."""
    request = b"GET /hold HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
    with serving(2) as server, half_sent(server, 2 + 256 + 40, request) as opened:
        assert reply(opened[-1]).startswith(b"HTTP/1.1 503 Service Unavailable")
        assert server.get("/healthz") == b"probe"


def test_a_body_larger_than_admitted_is_not_read() -> None:
    for framing in (b"Content-Length: 2000", b"Transfer-Encoding: chunked"):
        with serving(2, body_bytes=1000) as server, server.connect() as sock:
            sock.sendall(b"POST / HTTP/1.1\r\nHost: here\r\n" + framing + b"\r\n\r\n" + b"7d0\r\n" + bytes(2000) + b"\r\n")
            seen = reply(sock)
            assert seen.endswith(b"EventTooLarge")
            assert b"Connection: close" in seen


@pytest.mark.parametrize("framing", [b"Content-Length: 1000000000", b"Transfer-Encoding: chunked", b"Expect: 100-continue"])
def test_a_request_can_be_answered_by_its_head_alone(framing: bytes) -> None:
    """Nothing of the body is sent before the reply, and what is sent after it counts for nothing."""
    length = b"\r\nContent-Length: 5" if framing.startswith(b"Expect") else b""
    with serving(2, linger_seconds=ENOUGH, request_bytes=0) as server, server.connect() as sock:
        sock.sendall(b"POST /unread HTTP/1.1\r\nHost: here\r\n" + framing + length + b"\r\n\r\n")
        seen = reply(sock)
        assert seen.startswith(b"HTTP/1.1 200 OK")
        assert b"Connection: close" in seen
        sock.sendall(bytes(2**20))
        assert server.get("/").startswith(b"request-")


def test_bodies_in_memory_have_one_limit_together() -> None:
    """Bodies beyond the limit are refused, small ones never, and freed memory can be used again."""
    large = b"POST %b HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: 900000\r\n\r\n"
    small = b"POST / HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: 10\r\n\r\n0123456789"
    with serving(8, request_bytes=10**6) as server:
        with half_sent(server, 1, large % b"/hold" + bytes(890_000)):
            assert server.get("/").startswith(b"request-")  # By now the first bytes of the other have been read.
            seen = b""
            while not seen.endswith(b"Overloaded"):  # Not before the rest of the other is in.
                with server.connect() as sock:
                    sock.sendall(large % b"/" + bytes(900_000))
                    seen = reply(sock)
            with server.connect() as sock:
                sock.sendall(small)
                assert b"request-" in reply(sock)
        seen = b"Overloaded"
        while seen.endswith(b"Overloaded"):
            with server.connect() as sock:
                sock.sendall(large % b"/" + bytes(900_000))
                seen = reply(sock)
        assert b"request-" in seen


MODEST = [b"modest-%d" % number for number in range(5)]


def begun_by(client: bytes, length: int, received: int) -> bytes:
    head = b"POST /echo HTTP/1.1\r\nHost: here\r\nConnection: close\r\nClient: %b\r\nContent-Length: %d\r\n\r\n"
    return head % (client, length) + bytes(received)


def test_slow_bodies_of_a_greedy_client_give_way_to_those_of_five_modest_ones() -> None:
    """Eight bodies fill the budget and never end. The newest are refused, and the oldest can still be completed."""
    with serving(8, request_bytes=8 * 100_000, transfer_seconds=ENOUGH) as server, ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(8)]
        for sock in slow:
            sock.sendall(begun_by(b"greedy", 110_000, 109_000))
        refused = b""
        while not refused.endswith(b"Overloaded"):  # not before the others' bytes have been read
            with server.connect() as sock:
                sock.sendall(begun_by(b"greedy", 110_000, 110_000))
                refused = reply(sock)
        for client in MODEST:
            with server.connect() as sock:
                sock.sendall(begun_by(client, 90_000, 90_000))
                assert b" 200 OK" in reply(sock), "served at once"
        modest = [stack.enter_context(server.connect()) for _ in MODEST]
        for client, sock in zip(MODEST, modest, strict=True):
            sock.sendall(begun_by(client, 110_000, 109_000))
        refused_ones: set[socket.socket] = set()
        while len(refused_ones) < 5:  # they are told although they send nothing more
            refused_ones.update(select.select([sock for sock in slow if sock not in refused_ones], [], [], ENOUGH)[0])
        assert all(reply(sock).endswith(b"Overloaded") for sock in refused_ones)
        for sock in (*modest, *(sock for sock in slow if sock not in refused_ones)):
            sock.sendall(bytes(1_000))
            assert b" 200 OK" in reply(sock)


def test_connections_of_a_greedy_client_give_way_to_those_of_five_modest_ones() -> None:
    with serving(2, waiting_connections=40, head_seconds=ENOUGH, transfer_seconds=ENOUGH) as server, ExitStack() as stack:
        modest = [stack.enter_context(server.connect()) for _ in MODEST]
        for client, sock in zip(MODEST, modest, strict=True):
            sock.sendall(begun_by(client, 1_000, 10))
        assert server.get("/").startswith(b"request-")
        greedy = [stack.enter_context(server.connect()) for _ in range(200)]
        for sock in greedy:
            sock.sendall(begun_by(b"greedy", 1_000, 10))
        assert reply(greedy[0]) == b"", "the longest waiting one of the client that has most is closed"
        for sock in modest:
            sock.sendall(bytes(990))
            assert b" 200 OK" in reply(sock)


def test_threads_of_a_greedy_client_leave_some_to_five_modest_ones() -> None:
    """It holds six of eight threads and all places of requests that wait for one."""
    request = b"GET %b HTTP/1.1\r\nHost: here\r\nConnection: close\r\nClient: %b\r\n\r\n"
    hold = request % (b"/hold", b"greedy")
    with serving(6) as server, half_sent(server, 6 + 256 + 40, hold) as greedy, ExitStack() as stack:
        assert reply(greedy[-1]).startswith(b"HTTP/1.1 503 Service Unavailable")
        for client in MODEST:
            with server.connect() as sock:
                sock.sendall(request % (b"/", client))
                assert b"request-" in reply(sock)
        for client in MODEST:  # two get a thread, and three get places of the greedy one
            stack.enter_context(server.connect()).sendall(request % (b"/hold", client))
        refused = {greedy[-1]}
        while len(refused) < 40 + 3:
            refused.update(select.select([sock for sock in greedy if sock not in refused], [], [], ENOUGH)[0])
        assert server.get("/healthz") == b"probe"
