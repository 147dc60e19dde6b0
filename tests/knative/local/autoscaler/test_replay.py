"""Decisions recorded from Knative's own code, and the command that replays them."""

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from knative.commands.check import kpa_replay
from knative.local.autoscaler.replay import Replay, TraceError, replay
from tests.support.paths import DATA

TRACES = DATA / "kpa-traces.jsonl.gz"


def test_every_recorded_decision_is_reproduced() -> None:
    result = replay(TRACES)
    assert result.decisions == 40 * 151
    assert not result.differences, "\n".join(map(str, result.differences[:10]))


def test_the_command_reads_gzip_and_plain(tmp_path: Path) -> None:
    plain = tmp_path / "traces.jsonl"
    plain.write_bytes(gzip.decompress(TRACES.read_bytes()))
    for file in (TRACES, plain):
        result = CliRunner().invoke(kpa_replay, [str(file)])
        assert (result.exit_code, result.stdout) == (0, "6040 decisions, 0 differ\n")


@pytest.mark.parametrize(
    ("field", "value"),
    [("desired", 99), ("excess_burst_capacity", 99), ("panicking", None), ("stable", 2e-9), ("panic", 2e-9), ("valid", None)],
)
def test_a_difference_is_found_and_named(tmp_path: Path, field: str, value: float | None) -> None:
    trace = json.loads(gzip.decompress(TRACES.read_bytes()).splitlines()[0])
    step = trace["steps"][40]
    step[field] = not step[field] if value is None else step[field] + value
    file = tmp_path / "trace.jsonl"
    file.write_text(json.dumps(trace))
    result = replay(file)
    assert (result.decisions, len(result.differences)) == (151, 1)
    told = CliRunner().invoke(kpa_replay, [str(file)])
    assert (told.exit_code, told.stdout) == (1, "151 decisions, 1 differ\n")
    assert "trace-0 at 40 s" in told.stderr


@pytest.mark.parametrize(
    "content", [b"{", b'{"name": "x"}\n', b"\x1f\x8bbroken", b"\xff\xfe", gzip.compress(b"{}" * 100, mtime=0)[:-12]]
)
def test_a_file_that_is_no_trace_is_an_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken"
    file.write_bytes(content)
    with pytest.raises(TraceError, match="broken"):
        replay(file)
    result = CliRunner().invoke(kpa_replay, [str(file)])
    assert result.exit_code == 1
    assert "broken" in result.stderr


def test_an_empty_file_holds_no_decisions(tmp_path: Path) -> None:
    file = tmp_path / "empty"
    file.write_bytes(b"\n")
    assert replay(file) == Replay(0, ())
