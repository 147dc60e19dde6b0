"""A trip through three stages: rows that go on, and reports of a trip that fails."""

import time
from array import array
from collections.abc import Sequence
from contextlib import nullcontext

import msgspec
import pytest

from eventing.wire.batch_codec import decode_batch, encode_batch
from eventing.wire.events import Batch, Row, Status
from functions.gateway.stages.client import ForwardReply, ReplyOrigin, Trip, walk
from functions.gateway.stages.failures import StageFailed
from functions.gateway.stages.routes import Instance

IDS = ("a", "b", "c")
BATCH = Batch(tuple(Row(id_, 0, 5, 1) for id_ in IDS), memoryview(array("i", [1, 2, 3])))


class Stages:
    """Every row is ok but those in `lost`, (stage, id); `errors` are raised instead of a stage's reply."""

    def __init__(self, lost: set[tuple[int, str]] = frozenset(), errors: dict[int, Exception] | None = None) -> None:
        self.lost = lost
        self.errors = errors or {}
        self.sent: list[list[str]] = []

    def forward(self, instance: Instance, body: Sequence[bytes], ids: Sequence[str], *_: object) -> ForwardReply:
        if instance.stage in self.errors:
            raise self.errors[instance.stage]
        batch = decode_batch(b"".join(body))
        assert [row.id for row in batch.rows] == list(ids)
        self.sent.append(list(ids))
        rows = tuple(
            msgspec.structs.replace(row, status=Status.MISS, held=0, length=0) if (instance.stage, row.id) in self.lost else row
            for row in batch.rows
        )
        kept = array("i", [token for row, token in zip(rows, batch.token_ids, strict=True) if row.length])
        reply = Batch(rows, memoryview(kept))
        return ForwardReply(ReplyOrigin(instance, "boot", None), reply, memoryview(b"".join(encode_batch(reply))))


class Log:
    def __init__(self) -> None:
        self.replies: list[int] = []
        self.failures: list[tuple[Sequence[str], StageFailed]] = []

    def replied(self, trip: Trip, stage: int, reply: ForwardReply, seconds: float) -> None:
        self.replies.append(stage)

    def failed(self, trip: Trip, ids: Sequence[str], failure: StageFailed) -> None:
        self.failures.append((list(ids), failure))

    def first_stage_free(self) -> None:
        """Not needed here."""


def walked(stages: Stages, *, depth: int = 2, chunks: bool = False, raises: type[Exception] | None = None) -> Log:
    """Walks a trip and checks that it has left every lock for prompts."""
    instances = tuple(Instance(stage, f"http://{stage}") for stage in range(3))
    if chunks:
        instances[0].prompts.queue()
    log = Log()
    with pytest.raises(raises) if raises else nullcontext():
        walk(Trip(instances, BATCH, {}, depth, chunks, time.monotonic() + 10), stages, log)  # type: ignore[arg-type]
    assert all(instance.prompts.idle for instance in instances)
    return log


def test_rows_that_are_not_ok_are_left_out_and_the_others_go_on() -> None:
    stages = Stages({(0, "b"), (1, "a")})
    log = walked(stages)
    assert stages.sent == [["a", "b", "c"], ["a", "c"], ["c"]]
    assert (log.replies, log.failures) == ([0, 1, 2], [])


def test_a_trip_ends_at_its_depth_or_when_no_row_is_ok() -> None:
    assert walked(Stages(), depth=1, chunks=True).replies == [0, 1]
    assert walked(Stages({(0, id_) for id_ in IDS})).replies == [0]


@pytest.mark.parametrize("chunks", [False, True])
def test_a_failure_is_reported_for_the_rows_under_way(chunks: bool) -> None:
    log = walked(Stages({(0, "b")}, {1: StageFailed(1, "refused", "nobody")}), chunks=chunks)
    ((ids, failure),) = log.failures
    assert (ids, failure.cause, failure.stage, log.replies) == (["a", "c"], "refused", 1, [0])


def test_an_unexpected_error_is_raised() -> None:
    class Bug(Exception):
        pass

    log = walked(Stages(set(), {1: Bug()}), chunks=True, raises=Bug)
    assert (log.replies, log.failures) == ([0], [])
