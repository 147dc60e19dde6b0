"""JSON of reserve, release, warm-up and score events: bounds that errors name, and requests that are refused."""

import msgspec
import pytest

from eventing.wire.control import ReleaseRequest, ReserveRequest, WarmupReply, WarmupRequest
from eventing.wire.events import MAX_ROWS
from eventing.wire.score import ScoreRequest
from tests.support.faults import fault_of


@pytest.mark.parametrize(
    ("type_", "text", "seen"),
    [
        (ReserveRequest, '{"rows": []}', "rows: expected an array, length at least 1"),
        (ReserveRequest, '{"rows": [{"id": "a", "attempt": 0, "reserve_tokens": 0}]}', "rows[0].reserve_tokens: expected "),
        (ReleaseRequest, '{"rows": [{"id": "", "attempt": 0}]}', "rows[0].id: expected a text, length at least 1"),
        (ReleaseRequest, '{"rows": [' + ",".join(['{"id": "a", "attempt": 0}'] * (MAX_ROWS + 1)) + "]}", "length at most 1024"),
        (WarmupRequest, '{"hot": true}', "hot: "),
        (ScoreRequest, "{}", "not neither"),
        (ScoreRequest, '{"text": "x", "token_ids": [1, 2]}', "not both"),
        (ScoreRequest, '{"token_ids": [1]}', "token_ids: expected an array, length at least 2"),
        (ScoreRequest, '{"token_ids": [1, -2]}', "token_ids[1]: expected a whole number, at least 0"),
        (ScoreRequest, '{"text": "x", "temperature": 1}', "temperature: "),
    ],
)
def test_bad_messages_are_named(type_: type[msgspec.Struct], text: str, seen: str) -> None:
    assert seen in fault_of(text, type_)


def test_a_newer_stages_reply_can_be_read() -> None:
    reply = b'{"instance": "pod/1", "start_up": {"import": 1.2}, "added": {"later": 1}}'
    assert msgspec.json.decode(reply, type=WarmupReply).start_up == {"import": 1.2}
