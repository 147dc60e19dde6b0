"""The two averages: the cases of Knative's bucketing tests, as facts."""

import pytest

from knative.local.autoscaler.metric_window import ExponentialWindow, LinearWindow

Recorded = list[tuple[float, float]]  # second, value


def seconds_of(*values: float) -> Recorded:
    return list(enumerate(values))


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        pytest.param(
            5,
            [
                ([(0, 1)], 0, 1),
                (seconds_of(0, 2, 3, 4, 5), 4, 3),
                ([], 3.6, 3),  # a reader that lags behind sees what was written last
            ],
            id="over the recorded seconds",
        ),
        pytest.param(
            5,
            [(seconds_of(1, 2, 3, 4, 5), 6, (3 + 4 + 5) / 3), ([], 10, 0)],
            id="without the newest seconds if they have no data",
        ),
        pytest.param(
            5, [([*seconds_of(1, 2, 3, 4, 5), (6, 91)], 6, (3 + 4 + 5 + 0 + 91) / 5)], id="a missing second counts as zero"
        ),
        pytest.param(
            5,
            [
                ([*seconds_of(1, 2, 3), (60, 1984)], 60, 1984),
                ([(57, 4)], 60, (4 + 1984) / 4),
                ([(61, 5)], 61, pytest.approx((4 + 1984 + 5) / 5)),
                # a value a window old is dropped
                ([(58, 10), (55, 10), (56, 10)], 61, pytest.approx((4 + 10 + 1984 + 5) / 5)),
                ([(66, 10)], 66, 10),  # silence for exactly the window
            ],
            id="a window of silence starts it anew",
        ),
        pytest.param(5, [([(second, 5) for second in range(8, -1, -1)], 5, 5)], id="of times that run backwards"),
        pytest.param(60, [([(7, 1), (7.1, 10)], 7.9, 11)], id="values of one second add up"),
        pytest.param(2, [(seconds_of(0.000001, 0.000002), 1, 0.000002)], id="rounded to six digits half away from zero"),
    ],
)
def test_linear_average(seconds: int, steps: list[tuple[Recorded, float, float]]) -> None:
    """Each step records values and reads the average at a time."""
    window = LinearWindow(seconds)
    for recorded, now, average in steps:
        for second, value in recorded:
            window.record(second, value)
        assert window.average(now) == average


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
    for second, value in seconds_of(1, 2, 3, 4, 5, 6):
        window.record(second, value)
    assert round(window.average(5), 3) == 5.812


@pytest.mark.parametrize("kind", [LinearWindow, ExponentialWindow])
def test_empty_after_more_than_a_window(kind: type[LinearWindow] | type[ExponentialWindow]) -> None:
    window = kind(5)
    assert window.is_empty(0)
    assert window.average(0) == 0
    window.record(0, 1)
    assert not window.is_empty(5)
    assert window.is_empty(6)
