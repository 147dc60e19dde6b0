"""Violations of a rule by a field, in Knative's words, and the search for fields in a manifest."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Violation:
    """A field of a manifest and what is wrong with it."""

    field: str  # as Knative names it: spec.template.spec.containers[0].image
    reason: str
    flag: str | None = None  # the flag of config-features that would let the field through

    def __str__(self) -> str:
        return f"{self.reason}: {self.field}"


Violations = Iterator[Violation]
# (path for `select`, whether a value keeps the rule, reason for a violation, with {} in place of the value)
Rule = tuple[str, Callable[[Any], bool], str]


def select(value: Any, path: str, at: str) -> Iterator[tuple[str, Any]]:
    """Yields (field, value) for everything in `value` that `path` matches. at: path of `value` itself, with which fields begin.

    A path such as `containers[].env[].name` or `secret|configMap.items`: `[]` is each item of a list, `|` separates names.
    """
    step, _, rest = path.partition(".")
    names, is_list = step.removesuffix("[]"), step.endswith("[]")
    for name in names.split("|"):
        if name not in value:
            continue
        found = [(f"{at}.{name}[{index}]", item) for index, item in enumerate(value[name])] if is_list else []
        for field, item in found if is_list else [(f"{at}.{name}", value[name])]:
            if rest:
                yield from select(item, rest, field)
            else:
                yield field, item


def broken_rules(rules: Iterable[Rule], value: Any, at: str) -> Violations:
    for path, accepts, reason in rules:
        yield from (Violation(field, reason.format(seen)) for field, seen in select(value, path, at) if not accepts(seen))


def missing(field: str) -> Violation:
    return Violation(field, "missing field(s)")


def disallowed(field: str, flag: str | None = None) -> Violation:
    """The violation of a field that must not be set. flag: the flag of config-features that would let the field through."""
    off = "" if flag is None else f" (config-features has {flag} off)"
    return Violation(field, f"must not set the field(s){off}", flag)


def invalid(field: str, value: object, detail: str = "") -> Violation:
    return Violation(field, f"invalid value: {value}" + (f" ({detail})" if detail else ""))


def out_of_bounds(field: str, value: object, lowest: object, highest: object) -> Violation:
    return Violation(field, f"expected {lowest} <= {value} <= {highest}")


def exactly_one_of(value: Any, names: Sequence[str], at: str) -> Violations:
    """Yields violations unless exactly one of the fields `names` is set in `value`. at: path of `value`."""
    given = [name for name in names if name in value]
    if len(given) != 1:
        for name in given or names:
            yield Violation(f"{at}.{name}", f"expected exactly one, got {'both' if given else 'neither'}")


def in_one_line(violations: Iterable[Violation]) -> str:
    """Joins violations as Knative does: `reason: field, field; reason: field`."""
    fields: dict[str, list[str]] = {}
    for violation in violations:
        fields.setdefault(violation.reason, []).append(violation.field)
    return "; ".join(f"{reason}: {', '.join(names)}" for reason, names in fields.items())
