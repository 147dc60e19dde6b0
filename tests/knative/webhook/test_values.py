"""Numbers, durations, quantities and names as Go and Kubernetes read them."""

from collections.abc import Callable
from fractions import Fraction

import pytest

from knative.webhook.values import is_dns_1035_label, is_qualified_name, parse_duration, parse_float, parse_int, parse_quantity

SECOND = 10**9
DURATIONS = {
    "0": 0,
    "+0": 0,
    "30s": 30 * SECOND,
    "1m30s": 90 * SECOND,
    "1h15m30.918s": 4_530_918_000_000,
    "1.5h": 5400 * SECOND,
    ".5s": SECOND // 2,
    "5.s": 5 * SECOND,
    "-10s": -10 * SECOND,
    "39µs": 39_000,
    "1ns": 1,
}
QUANTITIES: dict[str | int, Fraction | int] = {
    "500m": Fraction(1, 2),
    "1Gi": 2**30,
    "1.5Gi": 3 * 2**29,
    "2k": 2000,
    "1e3": 1000,
    "1E": 10**18,
    ".5": Fraction(1, 2),
    "-1": -1,
    2: 2,
    "100n": Fraction(1, 10**7),
}
NUMBERS = {"1": 1, "1.": 1, ".5": 0.5, "1e-2": 0.01, "+Inf": float("inf")}


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        *((parse_duration, *pair) for pair in DURATIONS.items()),
        *((parse_quantity, *pair) for pair in QUANTITIES.items()),
        *((parse_float, *pair) for pair in NUMBERS.items()),
    ],
)
def test_values(parse: Callable[[object], object], text: object, expected: object) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("parse", "texts"),
    [
        (parse_duration, ("", "3", "-", "s", ".", "1d", "1 s", "s1", "1_0s", "3000000h", "--1s")),
        (parse_quantity, ("", "1gb", "1 Gi", "Gi", "1K", "0x10", "1ee3", "1_000")),
        (parse_int, ("", " 1", "1_0", "1.0", "0x1", "١")),
        (parse_float, ("", " 1", "1_0", "one", "1e")),
    ],
)
def test_other_texts_are_errors(parse: Callable[[str], object], texts: tuple[str, ...]) -> None:
    for text in texts:
        with pytest.raises(ValueError):
            parse(text)


def test_names() -> None:
    assert is_dns_1035_label("a-1")
    assert not is_dns_1035_label("1-a")
    assert not is_dns_1035_label("a-")
    assert not is_dns_1035_label("a\n")
    assert is_qualified_name("example.dev/Name_1.x")
    assert not is_qualified_name("Upper.dev/name")
    assert not is_qualified_name("/name")
    assert not is_qualified_name("a/b/c")
