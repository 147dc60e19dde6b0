"""The metrics and labels that a PromQL expression uses."""

from dataclasses import dataclass

import promql_parser as promql


@dataclass(frozen=True)
class Asked:
    """One metric of an expression, with the labels that it must have for the expression to mean anything."""

    metric: str
    labels: frozenset[str]


def asked(expression: str) -> list[Asked]:
    """Raises ValueError if Prometheus would not parse it."""
    found: list[Asked] = []
    _collect(promql.parse(expression), frozenset(), found)
    return found


def _collect(node: object, labels: frozenset[str], found: list[Asked]) -> None:
    """labels: those that the enclosing aggregations group by."""
    if isinstance(node, promql.VectorSelector):
        found.append(Asked(node.name or "", labels | {matcher.name for matcher in node.matchers.matchers}))
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
