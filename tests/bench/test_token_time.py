"""What the table of a token's time makes of what was counted."""

import pytest

from bench.serving.token_time import TokenTime, table, verdicts

FOUND = TokenTime(
    compute=0.008, queue=0.0001, codec=0.0004, http=0.001, events=0.0003, deciding=0.0001, rows=0.0001, seen=0.0102
)


def test_what_is_counted_is_held_against_what_the_client_sees() -> None:
    assert FOUND.accounted == pytest.approx(0.01)
    assert FOUND.missing_share == pytest.approx(0.0196, abs=1e-4)
    assert FOUND.compute_share == pytest.approx(0.784, abs=1e-3)
    (row,) = table({"int8": FOUND})[-1:]
    assert row == "| int8 | 8.00 | 0.10 | 0.40 | 1.00 | 0.30 | 0.10 | 0.10 | 10.20 | 98.0% | 78.4% |"


def test_compute_is_judged_by_dtype_and_what_is_missing_in_either_direction() -> None:
    assert [wanted for _, wanted, _, _ in verdicts("bfloat16", FOUND)] == [0.05, 0.8]
    assert [wanted for _, wanted, _, _ in verdicts("int8", FOUND)] == [0.05, 0.7]
    assert [wanted for _, wanted, _, _ in verdicts("int8, through queue-proxies", FOUND)] == [0.05]
    counted_twice = TokenTime(0.011, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.01)
    assert verdicts("int8", counted_twice)[0][2] == pytest.approx(0.1)
