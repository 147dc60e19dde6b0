"""For how long a tier is waited for."""

from functions.stage.engine.reuse import ComputeRate
from functions.stage.kv.worth import LEAST_SECONDS, MOST_SECONDS, Worth


def worth() -> Worth:
    """Of a stage that computes a thousand tokens in a second."""
    rate = ComputeRate()
    rate.computed(1_000, 1.0)
    return Worth(rate)


def test_while_nobody_knows_how_long_computing_takes_a_tier_is_waited_for() -> None:
    assert Worth(ComputeRate()).patience(10) == MOST_SECONDS


def test_one_block_that_took_long_says_nothing_about_two_thousand_tokens() -> None:
    tier = worth()
    tier.fetched(16, 0.1)
    assert tier.patience(2_000) == 2.0
    assert tier.patience(16) is None, "computing them is quicker"


def test_what_was_slower_than_computing_is_left_out_for_a_while() -> None:
    tier = worth()
    tier.fetched(2_000, 3.0)
    tries = [tier.patience(2_000) for _ in range(3)]
    assert tries == [None, None, 2.0]
    tier.fetched(2_000, 0.1)
    assert tier.patience(400) == LEAST_SECONDS
