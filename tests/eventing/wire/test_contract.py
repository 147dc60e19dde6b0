"""docs/reference.md lists every type, attribute, row field, status, limit and problem of the code, and nothing else."""

import inspect
import re

import msgspec
import pytest

from eventing.problems import PROBLEMS
from eventing.wire import batch_codec, events
from eventing.wire.events import Attribute, EventType, Row, Status
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "reference.md").read_text()


def _table(first_header: str) -> list[list[str]]:
    """The rows of the one table whose first column is called so, without code marks."""
    lines = PAGE.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_header} |"))
    rows = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("type", list(EventType)),
        ("extension", list(Attribute)),
        ("status of a row", list(Status)),
        ("field of a row", [field.name for field in msgspec.structs.fields(Row)]),
    ],
)
def test_tables_list_what_the_code_has(header: str, expected: list[str]) -> None:
    assert sorted(row[0] for row in _table(header)) == sorted(map(str, expected))


def test_problems_with_their_status() -> None:
    listed = {row[0]: int(row[1]) for row in _table("name")}
    assert listed == {problem.name: problem.status for problem in PROBLEMS.values()}


def test_limits() -> None:
    values = vars(events) | vars(batch_codec)
    assert {row[0]: int(row[1]) for row in _table("limit")} == {
        name: value for name, value in values.items() if name.startswith("MAX_")
    }


def test_the_layout_is_the_codecs_own() -> None:
    match = re.search(r"```\n(offset.*?)```", PAGE, re.DOTALL)
    documented = [line.strip() for line in match[1].splitlines()]
    assert "\n".join(documented) in "\n".join(line.strip() for line in (inspect.getdoc(batch_codec) or "").splitlines())
