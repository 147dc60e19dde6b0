"""The time limit of a fetch depends on how long computing and fetching took lately."""

from functions.stage.engine.kv_tiers import ComputeRate
from functions.stage.kv.fetching import LEAST_SECONDS, MOST_SECONDS, FetchEstimate


def estimate() -> FetchEstimate:
    """For a stage that computes a thousand tokens in a second."""
    rate = ComputeRate()
    rate.computed(1_000, 1.0)
    return FetchEstimate(rate)


def test_a_tier_gets_the_full_time_limit_before_the_compute_rate_is_known() -> None:
    assert FetchEstimate(ComputeRate()).time_limit(10) == MOST_SECONDS


def test_a_slow_small_fetch_does_not_predict_a_large_one() -> None:
    tier = estimate()
    tier.fetched(16, 0.1)
    assert tier.time_limit(2_000) == 2.0
    assert tier.time_limit(16) is None, "computing them is quicker"


def test_a_tier_slower_than_computing_is_skipped_for_a_while() -> None:
    tier = estimate()
    tier.fetched(2_000, 3.0)
    tries = [tier.time_limit(2_000) for _ in range(3)]
    assert tries == [None, None, 2.0]
    tier.fetched(2_000, 0.1)
    assert tier.time_limit(400) == LEAST_SECONDS
