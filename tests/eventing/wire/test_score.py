"""The JSON data of scoring: what a request refuses, and names."""

import pytest

from eventing.wire.score import ScoreRequest
from tests.support.faults import fault_of


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("{}", "not neither"),
        ('{"text": "x", "token_ids": [1, 2]}', "not both"),
        ('{"token_ids": [1]}', "token_ids: expected an array, length at least 2"),
        ('{"token_ids": [1, -2]}', "token_ids[1]: expected a whole number, at least 0"),
        ('{"text": "x", "temperature": 1}', "temperature: "),
    ],
)
def test_bad_requests_are_named(text: str, seen: str) -> None:
    assert seen in fault_of(text, ScoreRequest)
