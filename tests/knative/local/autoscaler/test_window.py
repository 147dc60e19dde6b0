"""The two averages: the cases of Knative's bucketing tests, as facts."""

import pytest

from knative.local.autoscaler.metric_window import ExponentialWindow, LinearWindow


def filled(*values: float, window: LinearWindow | ExponentialWindow) -> None:
    for second, value in enumerate(values):
        window.record(second, value)


def test_linear_average_is_over_the_recorded_seconds() -> None:
    window = LinearWindow(5)
    window.record(0, 1)
    assert window.average(0) == 1
    filled(0, 2, 3, 4, 5, window=window)
    assert window.average(4) == 3
    assert window.average(3.6) == 3, "a reader that lags behind sees what was written last"


def test_linear_average_leaves_out_the_newest_seconds_without_data() -> None:
    window = LinearWindow(5)
    filled(1, 2, 3, 4, 5, window=window)
    assert window.average(6) == (3 + 4 + 5) / 3
    assert window.average(10) == 0


def test_linear_average_counts_missing_seconds_as_zero() -> None:
    window = LinearWindow(5)
    filled(1, 2, 3, 4, 5, window=window)
    window.record(6, 91)
    assert window.average(6) == (3 + 4 + 5 + 0 + 91) / 5


def test_a_window_of_silence_starts_it_anew() -> None:
    window = LinearWindow(5)
    filled(1, 2, 3, window=window)
    window.record(60, 1984)
    assert window.average(60) == 1984
    window.record(57, 4)
    assert window.average(60) == (4 + 1984) / 4
    window.record(61, 5)
    assert window.average(61) == pytest.approx((4 + 1984 + 5) / 5)
    window.record(58, 10)
    window.record(55, 10)
    window.record(56, 10)
    assert window.average(61) == pytest.approx((4 + 10 + 1984 + 5) / 5), "a value a window old is dropped"
    window.record(66, 10)
    assert window.average(66) == 10, "silence for exactly the window"


def test_linear_average_of_times_that_run_backwards() -> None:
    window = LinearWindow(5)
    for second in range(8, -1, -1):
        window.record(second, 5)
    assert window.average(5) == 5


def test_values_of_one_second_add_up() -> None:
    window = LinearWindow(60)
    window.record(7, 1)
    window.record(7.1, 10)
    assert window.average(7.9) == 11


def test_linear_average_is_rounded_to_six_digits_half_away_from_zero() -> None:
    window = LinearWindow(2)
    window.record(0, 0.000001)
    window.record(1, 0.000002)
    assert window.average(1) == 0.000002


@pytest.mark.parametrize(("seconds", "smoothing"), [(100, 0.2), (60, 0.2), (40, 0.20567), (6, 0.78456)])
def test_smoothing_follows_the_window_but_not_below_a_fifth(seconds: int, smoothing: float) -> None:
    assert ExponentialWindow(seconds).smoothing == pytest.approx(smoothing, abs=1e-5)


def test_exponential_average_weighs_the_newest_second_most() -> None:
    window = ExponentialWindow(5)
    share, rest = window.smoothing, 1 - window.smoothing
    window.record(0, 2)
    assert window.average(0) == 2 * share
    assert window.average(1) == pytest.approx(2 * share * rest), "a second without data counts as zero"
    for second, value in enumerate((2, 3, 4, 5, 6), start=2):
        window.record(second, value)
    expected = sum(value * share * rest**age for age, value in enumerate((6, 5, 4, 3, 2)))
    assert window.average(6) == pytest.approx(expected)
    assert window.average(16) == 0


def test_exponential_average_known_by_hand() -> None:
    window = ExponentialWindow(5)
    filled(1, 2, 3, 4, 5, 6, window=window)
    assert round(window.average(5), 3) == 5.812


@pytest.mark.parametrize("kind", [LinearWindow, ExponentialWindow])
def test_empty_after_more_than_a_window(kind: type[LinearWindow] | type[ExponentialWindow]) -> None:
    window = kind(5)
    assert window.is_empty(0)
    assert window.average(0) == 0
    window.record(0, 1)
    assert not window.is_empty(5)
    assert window.is_empty(6)
