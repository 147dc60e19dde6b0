"""The judging of `bench.structured`: a case is always the same, and an answer that is not as asked shows."""

import json

import pytest

from bench.structured.asking import Ended
from bench.structured.cases import case
from bench.structured.report import markdown
from bench.structured.speed import Ratio


def test_cases_repeat_and_differ() -> None:
    assert [case(number).options for number in range(40)] == [case(number).options for number in range(40)]
    assert len({json.dumps(case(number).options) for number in range(200)}) > 150


@pytest.mark.parametrize("number", range(16))
def test_what_is_not_as_asked_shows(number: int) -> None:
    assert not case(number).fits('{"nothing": "of the kind"}')
    assert not Ended(number, "", "stop", 1).fits
    assert Ended(number, "", "length", 1).fits


def test_the_report_counts_what_is_wrong() -> None:
    answers = [Ended(0, "{", "stop", 1), Ended(1, "{", "length", 9)]
    text = markdown(answers, 3, [Ratio(1, 0.010, 0.0105)], "facts")
    assert "3 kills of a stage meanwhile: 1 answers ended by themselves, 1 of them not as asked; 1 ran into" in text
    assert "| 1 | 10.00 | 10.50 | 1.050 |" in text
