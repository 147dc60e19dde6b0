"""The request reader: independent of packet boundaries, strict, and within its budget of bytes."""

import contextlib
import gc
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventing.problems import EventTooLarge, Overloaded, Unauthorized
from functions.hosting.requests import (
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    REFUSED,
    SMALL_BODY_BYTES,
    BadRequest,
    Body,
    BodyBudget,
    BodyShare,
    RequestReader,
)

START = b"POST /a%20b?c=d HTTP/1.1\r\nHost: here\r\n"
PLAIN = START + b"Content-Length: 5\r\nX-One: 1\r\nX-One: 2\r\nx_two: 3\r\n\r\nhello"
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n3;a=b\r\nhel\r\n2\r\nlo\r\n0\r\nX-One: trailer\r\n\r\n"


def reader(most_bytes: int = 1000, budget: BodyBudget | None = None) -> RequestReader:
    return RequestReader(lambda _: most_bytes, budget or BodyBudget(10**6), {})


def body(of: RequestReader) -> bytes:
    assert of.complete
    read: bytes = of.environ["wsgi.input"].read()
    return bytes(read)


def fed(data: bytes, most_bytes: int = 1000, budget: BodyBudget | None = None) -> RequestReader:
    read = reader(most_bytes, budget)
    read.feed(data)
    return read


@given(st.sampled_from([PLAIN, CHUNKED]), st.data())
def test_a_request_is_the_same_however_it_is_cut(request: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(request)), max_size=6)))
    read = reader()
    for begin, end in zip([0, *cuts], [*cuts, len(request)], strict=True):
        if begin < end:
            read.feed(request[begin:end])
    assert body(read) == b"hello"
    assert read.keeps
    assert read.environ["PATH_INFO"] == "/a b"
    assert read.environ["QUERY_STRING"] == "c=d"
    assert read.environ["CONTENT_LENGTH"] == "5"
    assert read.environ.get("HTTP_X_ONE") == ("1,2" if request is PLAIN else None)
    assert "HTTP_X_TWO" not in read.environ


@given(st.lists(st.binary(max_size=30) | st.sampled_from([START, b"\r\n", b"\r\n\r\n", b"Content-Length: 5\r\n", b"5\r\n"])))
def test_any_bytes_raise_only_declared_errors(pieces: list[bytes]) -> None:
    for beginning in (b"", START, START + b"Transfer-Encoding: chunked\r\n\r\n"):
        read = reader()
        with contextlib.suppress(BadRequest):
            for piece in (beginning, *pieces):
                if piece and not read.complete:
                    read.feed(piece)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"no HTTP\r\n\r\n", 400),
        (START + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (START + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (START + b"Content-Length: -5\r\n\r\n", 400),
        (START + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n", 400),
        (START + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n", 400),
        (START + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (START + b"Transfer-Encoding: chunked\r\n\r\nno size\r\n", 400),
        (START + b"Content-Length : 5\r\n\r\n", 400),
        (b"POST / HTTP/1.1\nHost: here\n\nGET / HTTP/1.1\r\n\r\n", 400),
        (START + b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n", 431),
        (START + b"a: " + b"b" * MAX_HEAD_BYTES, 431),
        (START + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 2 * MAX_HEAD_BYTES, 400),
        (START + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * MAX_HEAD_BYTES, 400),
    ],
)
def test_an_invalid_request_is_refused(request_: bytes, status: int) -> None:
    with pytest.raises(BadRequest) as refused:
        fed(request_)
    assert refused.value.status == status


def test_an_unauthorized_request_is_refused_by_its_head_alone() -> None:
    def admit(_: object) -> int:
        raise Unauthorized("no")

    read = RequestReader(admit, BodyBudget(0), {})
    read.feed(START + b"Content-Length: 100000000\r\nExpect: 100-continue\r\n\r\n")
    assert isinstance(read.environ[REFUSED], Unauthorized)
    assert body(read) == b""
    assert (read.unread, read.keeps, read.expects_continue) == (True, False, False)


def test_a_body_beyond_its_limit_is_refused_as_soon_as_that_is_known() -> None:
    for request in (START + b"Content-Length: 11\r\n\r\n", START + b"Transfer-Encoding: chunked\r\n\r\nb\r\nhello world\r\n"):
        read = fed(request, most_bytes=10)
        assert isinstance(read.environ[REFUSED], EventTooLarge)
        assert read.unread


def held_bytes(budget: BodyBudget) -> int:
    budget._settle()
    return budget._shares.total


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow
@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_bodies_count_until_their_memory_is_free(framing: str) -> None:
    budget, size = BodyBudget(10**6), 900_000
    head = START + (
        b"Content-Length: %d\r\n\r\n" % size if framing == "length" else b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % size
    )
    end = b"" if framing == "length" else b"\r\n0\r\n\r\n"
    first = fed(head + bytes(size) + end, size, budget)
    assert held_bytes(budget) == size - SMALL_BODY_BYTES
    second = fed(head + bytes(size) + end, size, budget)
    assert isinstance(second.environ[REFUSED], Overloaded)
    assert held_bytes(budget) == size - SMALL_BODY_BYTES
    whole = first.environ["wsgi.input"].read()
    del first
    view = memoryview(whole)[5:]
    del whole
    assert held_bytes(budget) == size - SMALL_BODY_BYTES
    del view
    assert held_bytes(budget) == 0
    assert body(fed(START + b"Content-Length: 5\r\n\r\nhello", budget=BodyBudget(0))) == b"hello"


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("ending", ["refused", "left", "complete, and not read", "complete, and read in part"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_body_that_is_not_read_to_its_end_is_free_at_once(framing: str, ending: str) -> None:
    """Not only at the next garbage collection, or other requests would be refused meanwhile."""
    budget = BodyBudget(500_000)
    head = b"Content-Length: 900000\r\n\r\n" if framing == "length" else b"Transfer-Encoding: chunked\r\n\r\ndbba0\r\n"
    if ending.startswith("complete"):
        head = head.replace(b"900000", b"400000").replace(b"dbba0", b"61a80")
    read = fed(START + head + bytes(400_000), 10**6, budget)
    assert held_bytes(budget) > 0
    if ending == "refused":
        read.feed(bytes(200_000))
        assert isinstance(read.environ[REFUSED], Overloaded)
    else:
        if ending.startswith("complete"):
            if framing == "chunks":
                read.feed(b"\r\n0\r\n\r\n")
            assert read.complete
        if ending == "complete, and read in part":
            read.environ["wsgi.input"].read(10)
        del read
    assert held_bytes(budget) == 0


@pytest.mark.parametrize("body", [b"Content-Length: 5\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n", b"\r\n"])
def test_a_request_that_is_answered_by_its_head_is_complete_without_its_body(body: bytes) -> None:
    read = RequestReader(lambda _: None, BodyBudget(0), {})
    read.feed(START + body)
    assert read.complete
    assert REFUSED not in read.environ
    assert (read.unread, read.keeps) == (body != b"\r\n", body == b"\r\n")
    assert read.environ["wsgi.input"].read() == b""


@pytest.mark.parametrize(
    ("line", "keeps"),
    [
        (b"POST / HTTP/1.1\r\n", True),
        (b"POST / HTTP/1.1\r\nConnection: close\r\n", False),
        (b"POST / HTTP/1.1\r\nConnection: Upgrade, CLOSE\r\n", False),
        (b"POST / HTTP/1.1\r\nConnection: x\r\nConnection: close\r\n", False),
        (b"POST / HTTP/1.0\r\n", False),
        (b"POST / HTTP/1.0\r\nConnection: Keep-Alive\r\n", True),
        (b"POST / HTTP/1.0\r\nConnection: keep-alive, close\r\n", False),
    ],
)
def test_a_connection_is_kept_as_its_headers_say(line: bytes, keeps: bool) -> None:
    assert fed(line + b"Host: here\r\nContent-Length: 0\r\n\r\n").keeps is keeps


@pytest.mark.slow
def test_a_body_may_be_freed_in_the_middle_of_counting_another() -> None:
    """The garbage collector may run the destructor in the thread that holds the lock of `take`."""

    class Collects(int):
        def __radd__(self, other: int) -> int:
            gc.collect()
            return int(self) + other

    class Ring:
        def __init__(self, body: Body) -> None:
            self.body, self.self = body, self

    budget, taken = BodyBudget(10**6), []
    body = Body(900_000)
    body.charge(budget, 900_000)
    ring = Ring(body)
    del ring, body
    thread = threading.Thread(target=lambda: taken.append(budget.take(BodyShare("", Body(10)), Collects(10))), daemon=True)
    thread.start()
    thread.join(60)
    assert taken == [None], "it waits for itself"
    assert held_bytes(budget) == 10


def test_a_body_that_gives_way_cannot_be_completed_meanwhile() -> None:
    """Another thread may receive its last bytes as soon as the budget's lock is free."""
    budget, outcomes = BodyBudget(10**6), []
    greedy = [Body(500_000, "greedy") for _ in range(2)]
    for each in greedy:
        each.charge(budget, 500_000)
    lock = budget._lock

    class Freed(contextlib.AbstractContextManager[None]):
        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            budget._lock = lock
            lock.release()
            try:
                outcomes.append(greedy[1].keep())
            except Overloaded as refused:
                outcomes.append(type(refused))

    budget._lock = Freed()
    Body(300_000, "modest").charge(budget, 300_000)
    assert outcomes == [Overloaded]


def test_announcing_a_body_costs_nothing() -> None:
    budget = BodyBudget(10**6)
    waiting = [fed(START + b"Content-Length: 900000\r\n\r\n", 10**6, budget) for _ in range(100)]
    assert held_bytes(budget) == 0
    assert not any(read.complete for read in waiting)


def test_a_stream_of_a_body_is_read_in_any_pieces() -> None:
    for size in (1, 2, 3, 10):
        read = fed(PLAIN)
        stream, pieces = read.environ["wsgi.input"], []
        while piece := stream.read(size):
            pieces.append(bytes(piece))
        assert b"".join(pieces) == b"hello"
    read = fed(START + b"Content-Length: 6\r\n\r\na\nb\nc\n")
    assert list(read.environ["wsgi.input"]) == [b"a\n", b"b\n", b"c\n"]
