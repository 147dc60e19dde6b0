"""The traffic split of a Service (pkg/apis/serving/v1/route_validation.go)."""

from collections.abc import Sequence
from typing import Any

from knative.webhook.values import is_dns_1035_label, is_qualified_name
from knative.webhook.violation import Violation, Violations, disallowed, invalid, out_of_bounds


def traffic(targets: Sequence[dict[str, Any]], at: str) -> Violations:
    """Without any target Knative sends everything to the latest revision."""
    tags: dict[str, int] = {}
    for index, target in enumerate(targets):
        yield from _target(target, f"{at}[{index}]")
        tag = target.get("tag")
        if not tag:
            continue
        if tag in tags:
            for other in (tags[tag], index):
                yield Violation(f"{at}[{other}].tag", f'Multiple definitions for "{tag}"')
        tags.setdefault(tag, index)
    total = sum(target.get("percent", 0) for target in targets)
    if targets and total != 100:
        yield Violation(at, f"Traffic targets sum to {total}, want 100")


def _target(target: dict[str, Any], at: str) -> Violations:
    revision, latest = target.get("revisionName", ""), target.get("latestRevision", not target.get("revisionName"))
    if latest == bool(revision):
        word = str(latest).lower()
        yield Violation(f"{at}.latestRevision", f'may not set revisionName "{revision}" when latestRevision is {word}')
    if target.get("configurationName"):
        yield disallowed(f"{at}.configurationName")
    elif revision and not is_qualified_name(revision):
        yield Violation(f"{at}.revisionName", f'invalid key name "{revision}"')
    percent = target.get("percent", 0)
    if not 0 <= percent <= 100:
        yield out_of_bounds(f"{at}.percent", percent, 0, 100)
    if target.get("url"):
        yield disallowed(f"{at}.url")
    tag = target.get("tag", "")
    if tag and not is_dns_1035_label(tag):
        yield invalid(f"{at}.tag", tag, "not a DNS 1035 label")
