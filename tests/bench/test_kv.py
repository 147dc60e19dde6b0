"""What `bench.kv` judges and tells."""

import pytest

from bench.kv.report import MOST_COMPUTED, Case, Found, markdown, met, ratio


def second(seconds: float, different: int = 0) -> Found:
    return Found(Case.SECOND_TURN, seconds, 1.0, different)


def test_the_median_of_the_ratios_counts() -> None:
    assert ratio([second(0.1), second(0.9), second(0.11)]) == pytest.approx(0.11)
    assert met([second(0.1), second(0.9), second(0.11)]) is True
    assert met([second(0.13)]) is False


def test_another_answer_or_too_much_computed_is_a_miss() -> None:
    assert met([second(0.1), second(0.1, different=1)]) is False
    shared = [Found(Case.SHARED_PROMPT, 0.1, 1.0, 0, computed) for computed in (MOST_COMPUTED, MOST_COMPUTED + 1)]
    assert (met(shared[:1]), met(shared[1:])) == (True, False)


def test_a_peer_is_told_and_not_judged() -> None:
    tries = [Found(Case.LLAMA_CPP, 0.1, 1.0, 1)]
    assert met(tries) is None
    (row,) = [line for line in markdown({("Q4_1", Case.LLAMA_CPP): tries}, "facts").splitlines() if "Q4_1" in line]
    assert row == f"| Q4_1 | {Case.LLAMA_CPP} | 1 | 0.100 | 1.000 | 0.100 |  |  | 1 |"
