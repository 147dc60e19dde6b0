"""Server-sent events: what is written is read back, however the stream is cut, and the standard's own examples."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventing.http.sse import COMMENT, ServerSentEvent, SSEDecoder, encode_sse

_LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=20)


def _cut(data: st.DataObject, stream: bytes) -> list[bytes]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    return [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


def _read(chunks: list[bytes]) -> list[ServerSentEvent]:
    decoder = SSEDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


@given(st.lists(st.tuples(st.lists(_LINE, min_size=1), _LINE)), st.data())
def test_written_events_are_read_back_from_any_chunks(events: list[tuple[list[str], str]], data: st.DataObject) -> None:
    stream = b"".join(COMMENT + encode_sse("\n".join(lines), event=name) for lines, name in events)
    assert _read(_cut(data, stream)) == [ServerSentEvent("\n".join(lines), name or "message") for lines, name in events]


@given(st.data(), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_every_line_end_however_it_is_cut(data: st.DataObject, end: bytes) -> None:
    stream = end.join(
        [b"\xef\xbb\xbfdata: a", b"data:b", b": comment", b"", b"data", b"", b"id: 7", b"event: x", b"", b"data:  c", b"", b""]
    )
    assert _read(_cut(data, stream)) == [ServerSentEvent("a\nb"), ServerSentEvent(""), ServerSentEvent(" c")]


def test_the_layout() -> None:
    assert encode_sse(b'{"a":1}', event="token") == b'event: token\ndata: {"a":1}\n\n'
    assert encode_sse("") == b"data: \n\n"


def test_events_come_as_soon_as_they_are_complete() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"data: x\n") == []
    assert decoder.feed(b"\n") == [ServerSentEvent("x")]
    assert decoder.feed(b"") == []
    assert decoder.feed(b"data: cut off") == []


@pytest.mark.parametrize("name", ["a\nb", "a\r", "\0"])
def test_names_of_several_lines_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be one line"):
        encode_sse("x", event=name)


@given(st.binary())
def test_random_bytes_raise_nothing(stream: bytes) -> None:
    SSEDecoder().feed(stream)
