"""Traces: files are read unchanged, errors name their line, and drawn traces resemble the published one."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from bench.evaluation.trace import LOADS, Sizes, Trace, TraceInvalid, drawn, make_loads, read_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
LINES = ("2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109", "2023-11-16 18:15:51.2224670,879,55")


def written(folder: Path, text: str) -> Path:
    path = folder / "some.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    return path


def test_a_trace_is_read_unchanged(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, HEADER + "\n".join(LINES)))
    assert trace.arrival_seconds == pytest.approx([0, 4.314579, 4.541877], abs=1e-5)
    assert (trace.prompt_tokens.tolist(), trace.answer_tokens.tolist(), trace.name) == ([374, 396, 879], [44, 109, 55], "some")
    plain = tmp_path / "plain.csv"
    plain.write_text(HEADER + LINES[0])
    assert len(read_trace(plain)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2", r"some.csv.gz: begins with 'a,b', not with TIMESTAMP,ContextTokens"),
        ("", "begins with ''"),
        (HEADER, "holds no request"),
        (HEADER + "\n".join((LINES[1], LINES[0])), r"line 3: 2023-11-16 18:15:46.* is before the line above it; sort"),
        (HEADER + "\n".join((LINES[0], "2023-11-16 19:15:50.0,1,1")), r"line 3: nothing for 3603 s before it, more than 600"),
        (HEADER + "2023-11-16 18:15:46,0,44", "line 2: ContextTokens is '0', not a number from 1 to 1000000"),
        (HEADER + "2023-11-16 18:15:46,5,-3", "line 2: GeneratedTokens is '-3'"),
        (HEADER + f"2023-11-16 18:15:46,5,{'9' * 30}", "line 2: GeneratedTokens is '9999"),
        (HEADER + "2023-11-16 18:15:46,5,2000000", "GeneratedTokens is '2000000'"),
        (HEADER + "2023-11-16 18:15:46,5", "line 2: '2023-11-16 18:15:46,5' has not three values"),
        (HEADER + "2023-11-16 18:15:46,,5", "has not three values"),
        (HEADER + "yesterday,1,5", "line 2: 'yesterday' is no TIMESTAMP"),
    ],
)
def test_an_invalid_trace_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceInvalid, match=message):
        read_trace(written(tmp_path, text))


def test_a_file_that_breaks_off_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, HEADER + "\n".join((*LINES, *(LINES[2] for _ in range(500)))))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TraceInvalid, match="cannot be read as CSV"):
        read_trace(path)


def test_a_multiplied_trace_has_ordered_requests_of_the_same_sizes() -> None:
    once = drawn("one", np.full(100, 2.0), 1.0, 1, Sizes())
    many = once.times(2.5, 7)
    assert 2.3 * len(once) < len(many) < 2.7 * len(once)
    assert (np.diff(many.arrival_seconds) >= 0).all()
    assert many.seconds <= once.seconds
    assert set(many.prompt_tokens) <= set(once.prompt_tokens)


def test_a_drawn_trace_resembles_the_published_one_and_depends_on_its_seed() -> None:
    """19,366 requests have 1,020 and 1,155 tokens of prompt as median and mean, 129 and 211 of answer."""
    one, again, other = (drawn("x", np.full(4000, 5.0), 1.0, seed, Sizes()) for seed in (1, 1, 2))
    assert np.array_equal(one.arrival_seconds, again.arrival_seconds)
    assert not np.array_equal(one.arrival_seconds[:100], other.arrival_seconds[:100])
    assert len(one) == pytest.approx(20_000, rel=0.03)
    assert np.median(one.prompt_tokens) == pytest.approx(760, rel=0.1)
    assert one.prompt_tokens.mean() == pytest.approx(1155, rel=0.15)
    assert np.median(one.answer_tokens) == pytest.approx(150, rel=0.2)
    assert one.answer_tokens.mean() == pytest.approx(211, rel=0.1)
    assert one.prompt_tokens.min() >= 1


def test_sequences_are_cut_to_the_context() -> None:
    trace = Trace("x", np.arange(3.0), np.array([10, 5000, 90]), np.array([5, 10, 4000]))
    cut = trace.within(4096)
    assert (cut.prompt_tokens.tolist(), cut.answer_tokens.tolist()) == ([10, 4086, 90], [5, 10, 2048])


def test_loads_have_their_shape_and_the_trace_its_rate() -> None:
    trace = drawn("recorded", np.full(600, 3.0), 1.0, 1, Sizes())
    loads = make_loads(100, 10.0, 3, trace)
    assert tuple(loads) == LOADS
    ramp, day = loads["ramp"], loads["day"]
    assert (ramp.arrival_seconds < 30).sum() < (ramp.arrival_seconds > 70).sum() / 2
    assert (day.arrival_seconds < 15).sum() < 20 < (np.abs(day.arrival_seconds - 50) < 7).sum()
    assert len(loads["trace"]) == pytest.approx(600, rel=0.25)
