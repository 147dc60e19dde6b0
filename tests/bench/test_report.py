"""Judging a load run by its records, and replacing one section of the documentation."""

from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bench.load.report import Setting, judge, markdown, phase_figures
from bench.load.series import Answer, Failure, Phase, Replicas, Second, idle_seconds
from bench.records import Record
from bench.report import help_text, write_section

SETTING = Setting(("s0", "s1"), (0.1, 0.3), 4)
PLAN = ((0, 5), (1, 40), (8, 60), (0, 200))
TOKENS = {0: 0, 1: 2, 8: 16}
SLOW = {0: 0, 1: 1, 8: 2}


def records(change: Callable[[Record], Record] = lambda record: record) -> list[Record]:
    """The records of a run that met all targets; `change` spoils them."""
    found: list[Record] = []
    start = 0
    for conversations, seconds in PLAN:
        found.append(Phase(start, conversations, seconds))
        for second in range(start + 1, start + seconds + 1):
            found.append(Second(second - 0.5, conversations, TOKENS[conversations]))
            found.append(Replicas(second - 0.4, "s0", "s0-1", ready=min(1, conversations)))
            found.append(Replicas(second - 0.4, "s1", "s1-1", ready=SLOW[conversations]))
        if conversations:
            found.append(Answer(start + 10, 1, start, "a", "b", 9, 0.5, 0))
        start += seconds
    return [change(record) for record in found]


def held(changed: list[Record], what: str) -> bool:
    (verdict,) = [verdict for verdict in judge(SETTING, changed) if what in verdict.what]
    return bool(verdict.met)


def test_a_run_that_meets_all_targets() -> None:
    assert [verdict.what for verdict in judge(SETTING, records()) if not verdict.met] == []
    of_eight = phase_figures(SETTING, records())[2]
    assert (of_eight.replicas, of_eight.tokens_per_second, of_eight.possible_rate) == ((1, 2), 16, 20)
    text = markdown(SETTING, records())
    assert "| 8 | 60 | 1/2 | 16 | 20 | 0.50 s | 0.50 s | 1 | 0 |" in text
    assert "| all | 260 | " in text


def spoil(kind: type[Record], where: Callable[[Record], bool], change: Callable[[Record], Record]) -> list[Record]:
    return records(lambda record: change(record) if isinstance(record, kind) and where(record) else record)


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("no request failed", [*records(), Failure(300, 3, 299, "gone")]),
        ("at zero", spoil(Replicas, lambda r: r.t > 300, lambda r: Replicas(r.t, "s0", "s0-1", leaving=1))),
        ("not its neighbours", spoil(Replicas, lambda r: 60 < r.t < 70, lambda r: Replicas(r.t, "s0", "s0-1", starting=2))),
        ("8 conversations", spoil(Second, lambda r: 75 < r.t < 105, lambda r: Second(r.t, 8, 13))),
        ("replica-seconds", spoil(Replicas, lambda r: r.t > 5 and r.t < 300, lambda r: Replicas(r.t, "s1", "s1-1", ready=2))),
    ],
)
def test_a_missed_target_is_reported(what: str, changed: list[Record]) -> None:
    assert not held(changed, what)
    assert "missed" in markdown(SETTING, changed)


def test_an_unread_metrics_page_is_no_failed_request() -> None:
    assert held([*records(), Failure(300, -1, 299, "timeout")], "no request failed")


def test_idle_seconds_are_those_without_a_pod() -> None:
    assert idle_seconds(records()) == pytest.approx(5 + 199)


def test_a_section_is_replaced_and_others_are_left(tmp_path: Path) -> None:
    document = tmp_path / "new" / "benchmarks.md"
    write_section(document, "one", "first\n")
    write_section(document, "two", "second")
    write_section(document, "one", r"third \1")
    text = document.read_text()
    assert text.startswith("# Benchmarks")
    assert "<!-- begin one -->\nthird \\1\n<!-- end one -->\n\n<!-- begin two -->\nsecond\n<!-- end two -->\n" in text
    assert "first" not in text


def test_help_keeps_the_lines_of_examples() -> None:
    command = click.Command("measure", help=help_text("What it does.\n\n    python -m one\n    python -m two\n\nThe rest."))
    found = CliRunner().invoke(command, ["--help"]).output
    assert [line.strip() for line in found.splitlines() if "python" in line] == ["python -m one", "python -m two"]
