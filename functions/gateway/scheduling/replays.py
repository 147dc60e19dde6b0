"""Applies failures of stages to sequences (docs/scheduling.md, "When something breaks"). The caller holds the scheduler's lock.

An answer survives failures while its sequence has retries left. The sequence is computed again on another route, or only at the
stage that lost its KV.
"""

import logging
import time
from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import Final

from eventing.problems import InvalidRequest, PipelineUnavailable, Problem, ReplaysExhausted
from eventing.wire.events import Pooling, Row, Status
from functions.gateway.scheduling.micro_batch import Step
from functions.gateway.scheduling.sequence import Chunk, Sequence, names_of
from functions.gateway.scheduling.state import SchedulerState
from functions.gateway.stages.failures import StageFailed
from functions.gateway.stages.routes import Instance

_log: Final = logging.getLogger(__name__)


def trip_failed(state: SchedulerState, step: Step, ids: Items[str], failure: StageFailed) -> None:
    """Applies a trip that ended at `failure.stage` without a usable reply. Its sequences begin again on another route.

    `ids` name the rows that were on their way to the stage. If these rows may have broken the stage, or the stage refuses this
    gateway, the failure counts against their retry budgets.
    """
    stage_failed(state, step.trip.instances[failure.stage], failure)
    for id_ in ids:
        sequence, chunk = step.chunks[id_]
        if (failure.blames or failure.final) and not (sequence.must_restart or sequence.stream.over):
            sequence.retry_budget.failed_at(failure.stage, chunk)
            _suspect(state, sequence, str(failure), PipelineUnavailable if failure.final else ReplaysExhausted)
        sequence.progress.failing = True
        sequence.must_restart, sequence.broken_by = True, failure.cause
        sequence.progress.returned()
        settle(state, sequence)


def row_failed(state: SchedulerState, sequence: Sequence, chunk: Chunk, stage: int, row: Row) -> None:
    """Applies a row that `stage` did not compute, by the row's status.

    MISS: the tokens that the stage lacks are sent again. INVALID: the sequence fails with InvalidRequest; if the row had draft
    tokens, it is tried again without them instead. Other statuses: the sequence begins again on another route.
    """
    status, held = row.status, row.held or 0
    if status is Status.INVALID and chunk.draft_tokens and not chunk.scores and sequence.drafter is not None:
        # The draft tokens may be the reason, and the client did not ask for them: tries again without.
        sequence.drafter.disabled = True
        status, held = Status.MISS, chunk.position
    elif status is Status.INVALID:
        _log.info("%s: stage %d refuses it: %s", names_of([sequence]), stage, row.reason)
        sequence.stream.fail(InvalidRequest(row.reason or f"stage {stage} refuses the sequence"))
    elif status in (Status.MISS, Status.STALE):
        _lost(state, sequence, stage, status)
    if status is Status.MISS:
        # A mean takes the vectors of all chunks.
        is_mean = stage == state.placement.num_stages - 1 and sequence.prompt.pooling is Pooling.MEAN
        sequence.progress.missed(stage, 0 if is_mean else held)
    else:
        sequence.progress.failing = True
        sequence.must_restart, sequence.broken_by = True, str(status)
    sequence.progress.returned()
    settle(state, sequence)


def _lost(state: SchedulerState, sequence: Sequence, stage: int, status: Status) -> None:
    """Counts that `stage` lost KV of the sequence. Only a second loss at the same stage uses up retry budget.

    Does nothing until the sequence has recovered from an earlier loss, because later chunks in flight report the same loss
    again.
    """
    if sequence.progress.failing or sequence.stream.over:
        return
    if stage in sequence.retry_budget.lost_at:
        sequence.retry_budget.failed()
        _suspect(state, sequence, f"stage {stage} answered {status} again")
    sequence.retry_budget.lost_at.add(stage)
    if status is Status.MISS:
        replayed(state, sequence, str(status))


def _suspect(state: SchedulerState, sequence: Sequence, why: str, problem: type[Problem] = ReplaysExhausted) -> None:
    """Makes the sequence a suspect, which may have broken a stage. Ends it with `problem` if its retry budget is exhausted.

    `why` describes the last failure, for the log and the client's error message.
    """
    state.suspects.add(sequence)
    if sequence.retry_budget.exhausted:
        attempts = sequence.retry_budget.failures
        _log.warning("%s: given up: %s", names_of([sequence]), why)
        sequence.stream.fail(problem(f"gave up after {attempts} attempts that came no further; the last: {why}"))


def stage_failed(state: SchedulerState, instance: Instance, failure: StageFailed) -> None:
    """Gives the instance no work for a while after `failure`.

    If only a client's deadline has passed, ends the sequences that are past their deadline instead.
    """
    if failure.expired:
        state.expire(time.monotonic())
    else:
        state.last_failure = failure
        state.placement.avoid(instance)


def gateway_failed(state: SchedulerState, sequences: Iterable[Sequence]) -> None:
    """Ends these sequences with a Problem, because an unexpected error in the gateway left their state unknown."""
    for sequence in list(sequences):
        state.abandon(sequence, Problem("the gateway failed; its log has the traceback"))


# Beginning again.


def settle(state: SchedulerState, sequence: Sequence) -> None:
    """Dismisses a sequence that has ended, or queues one again that must restart. Does nothing while a chunk is in flight."""
    if not sequence.at_rest:
        return
    if sequence.stream.over:
        state.dismiss(sequence)
    elif sequence.must_restart:
        start_again(state, sequence)


def start_again(state: SchedulerState, sequence: Sequence) -> None:
    """Queues the sequence again, for another route. Counts a replay if `broken_by` names a failure."""
    if sequence.broken_by is not None and not sequence.stream.over:
        sequence.waiting_since = time.monotonic()
        replayed(state, sequence, sequence.broken_by)
    state.put_back(sequence)


def replayed(state: SchedulerState, sequence: Sequence, cause: str) -> None:
    sequence.stream.replays += 1
    state.stats.replays[cause] += 1
