"""A real cluster's verdict over 116 recorded manifests."""

import json
import re
from typing import Any

import pytest

from knative.webhook.check import validate
from tests.support.paths import DATA

CASES = json.loads((DATA / "webhook-cases.json").read_text())


def named(violations: list[str]) -> set[str]:
    """Every path of the manifest in what the webhook says."""
    return set(re.findall(r"\b(?:metadata|spec)\.[\w.\[\]*/-]*[\w\]]", " ".join(violations)))


@pytest.mark.parametrize("case", CASES, ids=[case["case"] for case in CASES])
def test_recorded_verdict(case: dict[str, Any]) -> None:
    violations = validate(case["manifest"])
    assert (not violations) == case["accepted"], list(map(str, violations))
    assert named(list(map(str, violations))) == set(case["fields"])
    assert all(violation.field in case["fields"] for violation in violations), "every reason names a recorded field"
