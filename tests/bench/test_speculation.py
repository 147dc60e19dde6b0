"""The report of the speculation benchmark."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bench.speculation import report
from bench.speculation.answers import Answered
from bench.speculation.report import Pair, Setting, markdown, wanted


def answered(seconds: float, *texts: str) -> Answered:
    return Answered(seconds, texts, prompt_tokens=50, tokens=100, accepted=30, rejected=10)


def test_ratios_compare_turns_pairwise_and_different_answers_are_counted() -> None:
    pair = Pair([answered(1.0, "a", "b"), answered(2.0, "a", "c")], [answered(2.0, "a", "b"), answered(6.0, "a", "b")])
    assert pair.ratio == pytest.approx(2.5)
    assert pair.different == 1


def test_the_table_has_accepted_drafts_and_the_throughput_that_a_network_leaves() -> None:
    pair = Pair([replace(answered(1.0, "a"), cpu_seconds=0.5)], [replace(answered(2.0, "a"), cpu_seconds=2.0)])
    slow = Pair([answered(2.0, "a")], [answered(4.0, "a")])
    text = markdown({Setting("int8", "quoting", 16, 0.0): pair, Setting("int8", "quoting", 16, 0.005): slow}, "facts")
    assert "| int8 | quoting | 16 | 0 ms | 1 | 50.0 | 100.0 | 2.00 (2.00–2.00) | 4.00 | 0.97 | 30 of 40 (75%) | 0 |" in text
    assert "5 ms each way leave 0.50 of the throughput without them" in text


def test_targets_depend_on_the_questions_and_the_network() -> None:
    assert wanted(Setting("int8", "quoting", 1, 0.0)) == 1.8
    assert wanted(Setting("int8", "quoting", 1, 0.005)) == 2.0
    assert wanted(Setting("int8", "free", 1, 0.0)) == wanted(Setting("int8", "quoting", 16, 0.0)) == 0.97


def test_there_are_twenty_questions_of_each_kind() -> None:
    sets = yaml.safe_load(Path(report.__file__).with_name("prompts.yaml").read_text(encoding="utf-8"))
    assert {name: len(set(questions)) for name, questions in sets.items()} == {"quoting": 20, "free": 20}
