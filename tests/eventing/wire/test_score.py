"""The JSON data of scoring: what a request refuses, and names."""

import msgspec
import pytest

from eventing.wire.score import ScoreRequest


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("{}", "not neither"),
        ('{"text": "x", "token_ids": [1, 2]}', "not both"),
        ('{"token_ids": [1]}', r"length >= 2 - at `\$.token_ids`"),
        ('{"token_ids": [1, -2]}', r"\$.token_ids\[1\]"),
        ('{"text": "x", "temperature": 1}', "unknown field `temperature`"),
    ],
)
def test_bad_requests_are_named(text: str, seen: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=seen):
        msgspec.json.decode(text, type=ScoreRequest)
