"""Cases of `bench.structured` are reproducible, and answers that do not match are found and counted."""

import json

import pytest

from bench.structured.__main__ import markdown
from bench.structured.asking import Ended
from bench.structured.cases import case
from bench.structured.speed import Ratio


def test_cases_repeat_and_differ() -> None:
    assert [case(number).options for number in range(40)] == [case(number).options for number in range(40)]
    assert len({json.dumps(case(number).options) for number in range(200)}) > 150


@pytest.mark.parametrize("number", range(16))
def test_a_wrong_answer_does_not_fit(number: int) -> None:
    assert not case(number).fits('{"nothing": "of the kind"}')
    assert not Ended(number, "", "stop", 1).fits
    assert Ended(number, "", "length", 1).fits


def test_the_report_counts_wrong_answers() -> None:
    answers = [Ended(0, "{", "stop", 1), Ended(1, "{", "length", 9)]
    text = markdown(answers, 3, [Ratio(1, 0.010, 0.0105)], "facts")
    assert "3 kills of a stage meanwhile: 1 answers ended by themselves, 1 of them wrong; 1 ran into" in text
    assert "| 1 | 10.00 | 10.50 | 1.050 |" in text
