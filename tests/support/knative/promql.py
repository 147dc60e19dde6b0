"""Evaluates the part of PromQL that Lamina's rules use, over scraped series.

Everything else raises NotImplementedError, so that a rule cannot pass by being misread. Semantics are those of Prometheus'
promql/functions.go: `rate` extrapolates to the ends of its range, a series that the last scrape did not have is stale but still
in ranges, and a series without a match has no value.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Samples = list[tuple[float, float]]

_COMPARISONS: Final[dict[str, Callable[[float, float], bool]]] = {
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
    "==": lambda a, b: a == b,
}
_ARITHMETIC: Final[dict[str, Callable[[float, float], float]]] = {
    "+": lambda a, b: a + b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b if b else math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a),
}
_AGGREGATIONS: Final[dict[str, Callable[[list[float]], float]]] = {"sum": sum, "max": max, "min": min}


@dataclass(frozen=True)
class UsedMetric:
    """A metric of an expression, with the labels that the expression needs."""

    metric: str
    labels: frozenset[str]


def used_metrics(expression: str) -> list[UsedMetric]:
    """Raises ValueError if Prometheus would not parse it."""
    found: list[UsedMetric] = []
    _collect(promql.parse(expression), frozenset(), found)
    return found


def _collect(node: object, labels: frozenset[str], found: list[UsedMetric]) -> None:
    """labels: those that the enclosing aggregations group by."""
    if isinstance(node, promql.VectorSelector):
        found.append(UsedMetric(node.name or "", labels | {matcher.name for matcher in node.matchers.matchers}))
    elif isinstance(node, promql.AggregateExpr):
        own = frozenset(node.modifier.labels) if node.modifier else frozenset()
        _collect(node.expr, labels | own, found)
    elif isinstance(node, promql.BinaryExpr):
        _collect(node.lhs, labels, found)
        _collect(node.rhs, labels, found)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            _collect(argument, labels, found)
    elif isinstance(node, promql.MatrixSelector):
        _collect(node.vector_selector, labels, found)
    elif isinstance(node, promql.ParenExpr | promql.UnaryExpr | promql.SubqueryExpr):
        _collect(node.expr, labels, found)
    else:
        assert isinstance(node, promql.NumberLiteral | promql.StringLiteral), type(node)


class Recorded:
    """Series: label sets, which include `__name__`, and their samples in order."""

    def __init__(self, scrape_seconds: float) -> None:
        self._scrape_seconds = scrape_seconds
        self._series: dict[str, dict[Labels, Samples]] = {}  # by name

    def scrape(self, page: str, at: float, **labels: str) -> None:
        """Adds a page of /metrics, with the target's labels."""
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                key = frozenset({"__name__": sample.name, **sample.labels, **labels}.items())
                self._series.setdefault(sample.name, {}).setdefault(key, []).append((at, sample.value))

    def at(self, expression: str, now: float) -> Vector:
        """Evaluates at an instant."""
        found = _Evaluation(self._series, now, self._scrape_seconds).of(promql.parse(expression))
        assert isinstance(found, dict)
        return found


class _Evaluation:
    def __init__(self, series: Mapping[str, Mapping[Labels, Samples]], now: float, scrape_seconds: float) -> None:
        self._series = series
        self._now = now
        self._scrape_seconds = scrape_seconds

    def of(self, node: Any) -> Vector | float:
        if isinstance(node, promql.NumberLiteral):
            return float(node.val)
        if isinstance(node, promql.ParenExpr):
            return self.of(node.expr)
        if isinstance(node, promql.VectorSelector):
            recent = self._ranges(node, self._scrape_seconds)
            return {labels: samples[-1][1] for labels, samples in recent.items()}
        if isinstance(node, promql.AggregateExpr):
            return self._aggregated(node)
        if isinstance(node, promql.Call):
            return self._called(node)
        if isinstance(node, promql.BinaryExpr):
            return self._combined(node)
        raise NotImplementedError(type(node))

    def _ranges(self, selector: Any, seconds: float) -> dict[Labels, Samples]:
        if selector.offset is not None or selector.at is not None:
            raise NotImplementedError(str(selector))
        found = {}
        for labels, samples in self._series.get(selector.name, {}).items():
            inside = [sample for sample in samples if self._now - seconds < sample[0] <= self._now]
            if inside and _matches(selector, dict(labels)):
                found[labels] = inside
        return found

    def _called(self, node: Any) -> Vector:
        name = node.func.name
        if name == "histogram_quantile":
            quantile, buckets = (self.of(argument) for argument in node.args)
            assert isinstance(quantile, float)
            assert isinstance(buckets, dict)
            return _quantiles(quantile, buckets)
        functions = {"rate": self._rate, "max_over_time": lambda samples, _: max(value for _, value in samples)}
        if name not in functions:
            raise NotImplementedError(name)
        (argument,) = node.args
        seconds = argument.range.total_seconds()
        values = {
            _unnamed(labels): functions[name](samples, seconds)
            for labels, samples in self._ranges(argument.vector_selector, seconds).items()
        }
        return {labels: value for labels, value in values.items() if value is not None}

    def _rate(self, samples: Samples, seconds: float) -> float | None:
        """Prometheus' extrapolatedRate: the increase, resets included, extrapolated to the range's ends if samples are near."""
        if len(samples) < 2:
            return None
        increase = sum(after if after < before else after - before for (_, before), (_, after) in pairwise(samples))
        covered = samples[-1][0] - samples[0][0]
        between = covered / (len(samples) - 1)
        before, after_last = samples[0][0] - (self._now - seconds), self._now - samples[-1][0]
        if increase > 0 and samples[0][1] >= 0:
            before = min(before, covered * samples[0][1] / increase)  # a counter is never below 0
        limit = between * 1.1
        extended = covered + (before if before < limit else between / 2) + (after_last if after_last < limit else between / 2)
        return increase * extended / covered / seconds

    def _aggregated(self, node: Any) -> Vector:
        if node.modifier is not None and node.modifier.type != promql.AggModifierType.By:
            raise NotImplementedError(str(node))
        kept = set(node.modifier.labels) if node.modifier else set()
        inner = self.of(node.expr)
        assert isinstance(inner, dict)
        groups: dict[Labels, list[float]] = {}
        for labels, value in inner.items():
            groups.setdefault(frozenset(item for item in labels if item[0] in kept), []).append(value)
        return {labels: _AGGREGATIONS[str(node.op)](values) for labels, values in groups.items()}

    def _combined(self, node: Any) -> Vector | float:
        operator, left, right = str(node.op), self.of(node.lhs), self.of(node.rhs)
        if isinstance(left, float) and isinstance(right, float):
            return _ARITHMETIC[operator](left, right)
        if operator == "and":
            assert isinstance(left, dict)
            assert isinstance(right, dict)
            key = _key_of(node)
            others = {key(labels) for labels in right}
            return {labels: value for labels, value in left.items() if key(labels) in others}
        if _key_of(node) is not _unnamed:
            raise NotImplementedError(str(node))
        return _paired(operator, left, right)


def _key_of(node: Any) -> Callable[[Labels], Labels]:
    """The labels that the two sides are matched by: all except the name, or those that `on` names."""
    modifier = node.modifier
    if modifier is None or (modifier.matching is None and not modifier.return_bool):
        return _unnamed
    if modifier.return_bool or modifier.group_labels or "Include" not in str(modifier.matching.type):
        raise NotImplementedError(str(node))
    names = set(modifier.matching.labels)
    return lambda labels: frozenset(item for item in labels if item[0] in names)


def _paired(operator: str, left: Vector | float, right: Vector | float) -> Vector:
    """Matches one to one by all labels except the name."""
    if isinstance(left, float):
        assert isinstance(right, dict)
        left = dict.fromkeys(right, left)
    elif isinstance(right, float):
        right = dict.fromkeys(left, right)
    others = {_unnamed(labels): value for labels, value in right.items()}
    found: Vector = {}
    for labels, value in left.items():
        key = _unnamed(labels)
        if key not in others:
            continue
        if operator in _COMPARISONS:
            if _COMPARISONS[operator](value, others[key]):
                found[labels] = value
        else:
            found[key] = _ARITHMETIC[operator](value, others[key])
    return found


def _quantiles(quantile: float, buckets: Vector) -> Vector:
    """Interpolates linearly within a bucket, as Prometheus does."""
    groups: dict[Labels, list[tuple[float, float]]] = {}
    for labels, value in buckets.items():
        bound = float(dict(labels)["le"])
        groups.setdefault(frozenset(item for item in labels if item[0] != "le"), []).append((bound, value))
    return {labels: _quantile(quantile, sorted(counts)) for labels, counts in groups.items()}


def _quantile(quantile: float, counts: list[tuple[float, float]]) -> float:
    total = counts[-1][1]
    if total == 0:
        return math.nan
    rank = quantile * total
    below, under = 0.0, 0.0
    for bound, count in counts:
        if count >= rank:
            return under if math.isinf(bound) else under + (bound - under) * (rank - below) / (count - below)
        below, under = count, bound
    return math.nan


def _matches(selector: Any, labels: Mapping[str, str]) -> bool:
    for matcher in selector.matchers.matchers:
        seen, kind = labels.get(matcher.name, ""), str(matcher.op)
        agrees = re.fullmatch(matcher.value, seen) is not None if "Re" in kind else seen == matcher.value
        if agrees == ("Not" in kind):
            return False
    return True


def _unnamed(labels: Labels) -> Labels:
    return frozenset(item for item in labels if item[0] != "__name__")
