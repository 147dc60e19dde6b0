"""What the webhook says of one field, in Knative's words."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """One field and what is wrong with it."""

    field: str
    """As Knative names it: `spec.template.spec.containers[0].image`."""
    reason: str
    flag: str | None = None
    """Of config-features, which would let the field through."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.field}"


Violations = Iterator[Violation]


def missing(field: str) -> Violation:
    return Violation(field, "missing field(s)")


def disallowed(field: str, flag: str | None = None) -> Violation:
    """flag: that of config-features which would let it through."""
    behind = "" if flag is None else f" (config-features has {flag} off)"
    return Violation(field, f"must not set the field(s){behind}", flag)


def invalid(field: str, value: object, detail: str = "") -> Violation:
    return Violation(field, f"invalid value: {value}" + (f" ({detail})" if detail else ""))


def out_of_bounds(field: str, value: object, lowest: object, highest: object) -> Violation:
    return Violation(field, f"expected {lowest} <= {value} <= {highest}")


def exactly_one_of(at: str, names: Sequence[str], given: Sequence[str]) -> Violations:
    """For a group of fields of which one must be set, and not more."""
    if not given:
        for name in names:
            yield Violation(f"{at}.{name}", "expected exactly one, got neither")
    elif len(given) > 1:
        for name in given:
            yield Violation(f"{at}.{name}", "expected exactly one, got both")


def in_one_line(violations: Iterable[Violation]) -> str:
    """`reason: field, field; reason: field`, as Knative gathers them."""
    fields: dict[str, list[str]] = {}
    for violation in violations:
        fields.setdefault(violation.reason, []).append(violation.field)
    return "; ".join(f"{reason}: {', '.join(names)}" for reason, names in fields.items())
