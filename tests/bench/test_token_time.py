"""The table of a token's time, and its targets."""

import pytest

from bench.serving.token_time import TokenTime, token_time_table, token_time_verdicts

FOUND = TokenTime(
    compute=0.008, queue=0.0001, codec=0.0004, http=0.001, events=0.0003, deciding=0.0001, rows=0.0001, seen=0.0102
)


def test_counted_time_is_compared_with_the_clients() -> None:
    assert FOUND.accounted == pytest.approx(0.01)
    assert FOUND.missing_share == pytest.approx(0.0196, abs=1e-4)
    assert FOUND.compute_share == pytest.approx(0.784, abs=1e-3)
    assert (
        token_time_table({"int8": FOUND}).splitlines()[-1]
        == "| int8 | 8.00 | 0.10 | 0.40 | 1.00 | 0.30 | 0.10 | 0.10 | 10.20 | 98.0% | 78.4% |"
    )


def test_compute_is_judged_by_dtype_and_unaccounted_time_in_both_directions() -> None:
    assert [verdict.wanted for verdict in token_time_verdicts("bfloat16", FOUND)] == ["≤ 5.0%", "≥ 80.0%"]
    assert [verdict.wanted for verdict in token_time_verdicts("int8", FOUND)] == ["≤ 5.0%", "≥ 70.0%"]
    assert [verdict.wanted for verdict in token_time_verdicts("int8, through queue-proxies", FOUND)] == ["≤ 5.0%"]
    counted_twice = TokenTime(0.011, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.01)
    assert str(token_time_verdicts("int8", counted_twice)[0]).endswith(": 10.0%, wanted ≤ 5.0%")
