"""Batches for tests: one maker for hand-written cases and one Hypothesis strategy for all others."""

from array import array
from collections.abc import Sequence

from hypothesis import strategies as st

from eventing.wire.batch_codec import encode_batch
from eventing.wire.events import (
    ITEM_BYTES,
    MAX_DRAFT_TOKENS,
    MAX_POSITION,
    Batch,
    Result,
    Row,
    Sampling,
    Status,
    Tensor,
    Want,
    row_bytes,
)

_TOKENS = st.none() | st.lists(st.integers(0, 2**31 - 1)).map(tuple)
_FLOATS = st.floats(0.001, 1, allow_nan=False)


def make_batch(lengths: Sequence[int], hidden_size: int = 0, dtype: str = "F32") -> Batch:
    """Rows `s0`, `s1`, … of these lengths, tokens counted up from 0, and a tensor of counted bytes if hidden_size is given."""
    rows = tuple(Row(id=f"s{index}", attempt=0, position=0, length=length) for index, length in enumerate(lengths))
    tokens = sum(lengths)
    hidden = None
    if hidden_size:
        data = bytes(index % 251 for index in range(tokens * row_bytes(dtype, hidden_size)))
        hidden = Tensor(dtype, (tokens, hidden_size), memoryview(data))
    return Batch(rows, memoryview(array("i", range(tokens))), hidden)


def encoded(batch: Batch) -> bytes:
    """The body in one piece."""
    return b"".join(encode_batch(batch))


def _samplings() -> st.SearchStrategy[Sampling]:
    return st.builds(
        Sampling,
        temperature=st.floats(0, 100),
        top_k=st.integers(0, 2**31),
        top_p=_FLOATS,
        min_p=_FLOATS,
        repetition_penalty=_FLOATS,
        seed=st.integers(0, 2**63 - 1),
    )


@st.composite
def _rows(draw: st.DrawFn) -> Row:
    status = draw(st.sampled_from(Status))
    return Row(
        id=draw(st.text(st.characters(codec="utf-8"), min_size=1, max_size=128)),
        attempt=draw(st.integers(0, 2**31 - 1)),
        position=draw(st.integers(0, MAX_POSITION)),
        length=draw(st.integers(0, 9)) if status is Status.OK else 0,
        want=draw(st.sampled_from(Want)),
        sampling=draw(st.none() | _samplings()),
        reserve_tokens=draw(st.none() | st.integers(1, MAX_POSITION)),
        draft_tokens=draw(st.integers(0, MAX_DRAFT_TOKENS)),
        status=status,
        held=draw(st.none() | st.integers(0, MAX_POSITION)),
        reason=draw(st.none() | st.text(st.characters(codec="utf-8"), max_size=20)),
        result=draw(st.none() | st.builds(Result, tokens=_TOKENS, logprobs=st.none() | st.tuples(st.floats(max_value=0)))),
    )


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Every field and limit of the wire format, small enough to be quick."""
    rows = tuple(draw(st.lists(_rows(), min_size=1, max_size=12)))
    tokens = sum(row.length for row in rows)
    ids = draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=tokens, max_size=tokens))
    hidden = None
    if draw(st.booleans()):
        dtype, hidden_size = draw(st.sampled_from(sorted(ITEM_BYTES))), draw(st.integers(1, 7))
        bytes_length = tokens * row_bytes(dtype, hidden_size)
        data = draw(st.binary(min_size=bytes_length, max_size=bytes_length))
        hidden = Tensor(dtype, (tokens, hidden_size), memoryview(data))
    return Batch(rows, memoryview(array("i", ids)), hidden)
