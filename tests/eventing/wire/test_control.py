"""What the gateway says to a stage besides forward events: bounds that are named, and what requests refuse."""

import msgspec
import pytest

from eventing.wire.control import ReleaseRequest, ReserveRequest, WarmupReply, WarmupRequest
from eventing.wire.events import MAX_ROWS


@pytest.mark.parametrize(
    ("type_", "text", "seen"),
    [
        (ReserveRequest, '{"rows": []}', r"\$.rows"),
        (ReserveRequest, '{"rows": [{"id": "a", "attempt": 0, "reserve_tokens": 0}]}', r"\$.rows\[0\].reserve_tokens"),
        (ReleaseRequest, '{"rows": [{"id": "", "attempt": 0}]}', r"\$.rows\[0\].id"),
        (ReleaseRequest, '{"rows": [' + ",".join(['{"id": "a", "attempt": 0}'] * (MAX_ROWS + 1)) + "]}", r"length <= 1024"),
        (WarmupRequest, '{"hot": true}', "unknown field `hot`"),
    ],
)
def test_bad_messages_are_named(type_: type[msgspec.Struct], text: str, seen: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=seen):
        msgspec.json.decode(text, type=type_)


def test_a_newer_stages_reply_can_be_read() -> None:
    reply = b'{"instance": "pod/1", "start_up": {"import": 1.2}, "added": {"later": 1}}'
    assert msgspec.json.decode(reply, type=WarmupReply).start_up == {"import": 1.2}
