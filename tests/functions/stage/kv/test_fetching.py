"""For how long a tier is waited for."""

from functions.stage.engine.kv_tiers import ComputeRate
from functions.stage.kv.fetching import LEAST_SECONDS, MOST_SECONDS, FetchEstimate


def estimate() -> FetchEstimate:
    """Of a stage that computes a thousand tokens in a second."""
    rate = ComputeRate()
    rate.computed(1_000, 1.0)
    return FetchEstimate(rate)


def test_while_nobody_knows_how_long_computing_takes_a_tier_is_waited_for() -> None:
    assert FetchEstimate(ComputeRate()).time_limit(10) == MOST_SECONDS


def test_one_block_that_took_long_says_nothing_about_two_thousand_tokens() -> None:
    tier = estimate()
    tier.fetched(16, 0.1)
    assert tier.time_limit(2_000) == 2.0
    assert tier.time_limit(16) is None, "computing them is quicker"


def test_what_was_slower_than_computing_is_left_out_for_a_while() -> None:
    tier = estimate()
    tier.fetched(2_000, 3.0)
    tries = [tier.time_limit(2_000) for _ in range(3)]
    assert tries == [None, None, 2.0]
    tier.fetched(2_000, 0.1)
    assert tier.time_limit(400) == LEAST_SECONDS
