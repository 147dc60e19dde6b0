"""Applies replies, reservations and failures of stages to the scheduler's state (docs/scheduling.md, "When something breaks").

The caller holds the scheduler's lock. A failed event ends no answer while its sequences have retries left: they are computed
again on another route, or only at the stage that lost their KV.
"""

import logging
import time
from collections.abc import Iterable
from collections.abc import Sequence as Items
from itertools import repeat
from typing import Final

from eventing.problems import AdapterUnusable, InvalidRequest, PipelineUnavailable, Problem, ReplaysExhausted
from eventing.wire.control import ReleaseRow
from eventing.wire.events import Pooling, Result, Row, Status
from eventing.wire.generation import TokenLogprob
from functions.gateway.scheduling.actions import Reservation, Reserve
from functions.gateway.scheduling.micro_batch import Step
from functions.gateway.scheduling.prefix_sharing import follow, stop_following
from functions.gateway.scheduling.sequence import Chunk, Sequence, names_of
from functions.gateway.scheduling.state import SchedulerState
from functions.gateway.scheduling.stats import StageStats, seconds_on
from functions.gateway.stages.client import ForwardReply, ReplyOrigin
from functions.gateway.stages.failures import StageFailed
from functions.gateway.stages.routes import Instance

_log: Final = logging.getLogger(__name__)

_INCOMPLETE: Final = (
    "its reply lacks a token, a log-probability or a vector that was wanted, or accepts draft tokens that were not sent"
)


# A stage replied.


def stage_replied(state: SchedulerState, step: Step, stage: int, reply: ForwardReply, seconds: float) -> None:
    """Applies the reply of one stage to the sequences of `step`. The last stage's reply carries their new tokens.

    stage: its index. seconds: from the request to the reply. Raises StageFailed if the last stage's reply lacks a requested
    token or log-probability.
    """
    rows = reply.batch.rows
    chunks = [step.chunks[row.id] for row in rows]
    note_origin(state, reply.origin, chunks)
    stats = state.stats.stages[stage]
    stats.step(seconds, step.decode_tokens, reply.exchange_seconds, reply.engine_seconds)
    if reply.pass_tokens and state.placement.ready_counts()[stage] > 1:
        _note_pass(stats, step.trip.instances[stage], reply)
    if step.micro_batch is None:
        stats.prompt_pass(reply.pass_tokens, reply.pass_seconds)
    if stage == state.placement.num_stages - 1:
        for row, (sequence, chunk) in zip(rows, chunks, strict=True):
            if row.status is Status.OK and _is_incomplete(row.result, sequence, chunk):
                raise StageFailed(stage, "malformed", _INCOMPLETE, blames=True)
    for row, (sequence, chunk) in zip(rows, chunks, strict=True):
        if row.status is not Status.OK:
            _row_failed(state, sequence, chunk, stage, row)
            continue
        sequence.progress.computed(stage, chunk)
        if stage == step.trip.depth:
            _chunk_over(state, sequence, chunk, row.result)


def note_origin(state: SchedulerState, origin: ReplyOrigin, in_trip: Items[tuple[Sequence, Chunk]] = ()) -> None:
    """Records that an instance replied, and its free memory. If its boot id is a new one, the instance restarted.

    Sequences that it held are then computed again at this stage. in_trip: the rows of the reply, which are left out, because
    their statuses already say what the instance has lost.
    """
    instance = origin.instance
    if instance.boot not in ("", origin.boot):
        told = {sequence for sequence, _ in in_trip}
        for batch in state.micro_batches:
            for sequence in batch.sequences if instance in batch.route.instances else ():
                if sequence.reserved and sequence not in told:
                    sequence.progress.missed(instance.stage, 0)
                    _replayed(state, sequence, "rebooted")
    instance.replied(origin.boot, origin.free_tokens, origin.before, origin.lineage)


def _note_pass(stats: StageStats, instance: Instance, reply: ForwardReply) -> None:
    """Compares the pass that computed a step with the quickest passes of its size at the stage: a slow instance is noticed."""
    stats.passes.step(reply.pass_tokens, reply.pass_seconds)
    # By all sizes: a slow instance gets small steps, which no other may have measured.
    quickest = seconds_on(stats.passes.points(), reply.pass_tokens) or reply.pass_seconds
    was_slow = instance.slow
    instance.passed(reply.pass_seconds, quickest, time.monotonic())
    if instance.slow is not was_slow:
        what = "as quick again as" if was_slow else f"{instance.pace:.1f} times as slow as"
        _log.warning("stage %d: passes of %s are %s the quickest there", instance.stage, instance.url, what)


def _chunk_over(state: SchedulerState, sequence: Sequence, chunk: Chunk, result: Result | None) -> None:
    """Applies a chunk that its last stage has computed: passes on tokens or scores, and grows a reservation that is full.

    result: the row's result; None if neither a token nor log-probabilities were requested.
    """
    sequence.progress.returned()
    if result is not None and chunk.scores:
        tokens = sequence.tokens[chunk.position + 1 : chunk.end + 1]
        scored = sequence.stream.scored(chunk.position + 1, _logprobs_of(tokens, result))
        if not sequence.prompt.max_tokens and scored == len(sequence.prompt.token_ids) - 1:
            sequence.stream.finish("length")
    elif result is not None and result.vector is not None:
        _pooled(state, sequence, chunk, result.vector)
    elif result is not None and result.tokens:
        _drawn(state, sequence, len(chunk.draft_tokens), result.tokens, result)
        if not sequence.stream.over and len(sequence.tokens) >= sequence.reserve_tokens:
            # It releases its memory and queues again for more. Otherwise two sequences could wait for each other's memory.
            if sequence.grow():
                state.stats.grown += 1
                sequence.must_restart = True
            else:
                sequence.stream.finish("length")
    _settle(state, sequence)


def _pooled(state: SchedulerState, sequence: Sequence, chunk: Chunk, vector: bytes) -> None:
    """Adds a chunk's vector to the prompt's, which is complete when all tokens are in it."""
    position, length = chunk.position, chunk.length
    if sequence.prompt.pooling is Pooling.LAST:
        position, length = 0, len(sequence.tokens)
    numbers = memoryview(vector).cast("f")
    if sequence.stream.pooled(position, length, numbers) == len(sequence.tokens):
        sequence.stream.finish("length")


def _drawn(state: SchedulerState, sequence: Sequence, drafted: int, tokens: Items[int], result: Result) -> None:
    """Applies `tokens` that the last stage drew: the accepted draft tokens and one more. drafted: draft tokens in the chunk."""
    stats, stream = state.stats, sequence.stream
    accepted = len(tokens) - 1
    stats.tokens += len(tokens)
    if drafted or accepted:
        stats.draft_tokens_accepted += accepted
        stats.draft_tokens_rejected += drafted - accepted
        stream.draft_tokens_accepted += accepted
        stream.draft_tokens_rejected += drafted - accepted
        sequence.progress.accepted(accepted)
    if sequence.retry_budget.failures or sequence.retry_budget.lost_at:
        sequence.retry_budget.reset()
        state.suspects.discard(sequence)
    sequence.progress.grammar_known = True
    if sequence.drafter is not None:
        sequence.drafter.drawn(tokens)
    logprobs = repeat(None) if sequence.prompt.top_logprobs is None else _logprobs_of(tokens, result)
    for token, logprob in zip(tokens, logprobs, strict=False):
        if stream.over:
            return
        sequence.tokens.append(token)
        stream.put(token, logprob)


def _logprobs_of(tokens: Items[int], result: Result) -> list[TokenLogprob]:
    logprobs = result.logprobs or ()
    tops = result.top_logprobs or ((),) * len(logprobs)
    return [TokenLogprob(token, logprob, top) for token, logprob, top in zip(tokens, logprobs, tops, strict=True)]


def _is_incomplete(result: Result | None, sequence: Sequence, chunk: Chunk) -> bool:
    """Whether a requested token or log-probability is missing, or accepted draft tokens differ from those that were sent."""
    pooling = sequence.prompt.pooling
    if not (chunk.scores or pooling is Pooling.MEAN or chunk.end == len(sequence.tokens)):
        return False
    if result is None:
        return True
    if pooling is not None:
        return not result.vector or len(result.vector) % 4 != 0
    top, logprobs = sequence.prompt.top_logprobs, result.logprobs or ()
    if top and len(result.top_logprobs or ()) != len(logprobs):
        return True
    if chunk.scores:
        return len(logprobs) != chunk.length
    tokens = result.tokens or ()
    if top is not None and len(logprobs) != len(tokens):
        return True
    return not tokens or tokens[:-1] != chunk.draft_tokens[: len(tokens) - 1]


# A step, or one row of it, failed.


def trip_failed(state: SchedulerState, step: Step, ids: Items[str], failure: StageFailed) -> None:
    """Applies a trip that ended at `failure.stage` without a usable reply: its sequences begin again on another route.

    ids: the rows that were on their way to the stage. If these rows may have broken the stage, or the stage refuses this
    gateway, the failure counts against their retry budgets.
    """
    _stage_failed(state, step.trip.instances[failure.stage], failure)
    for id_ in ids:
        sequence, chunk = step.chunks[id_]
        if (failure.blames or failure.final) and not (sequence.must_restart or sequence.stream.over):
            sequence.retry_budget.failed_at(failure.stage, chunk)
            _suspect(state, sequence, str(failure), PipelineUnavailable if failure.final else ReplaysExhausted)
        sequence.progress.failing = True
        sequence.must_restart, sequence.broken_by = True, failure.cause
        sequence.progress.returned()
        _settle(state, sequence)


def _row_failed(state: SchedulerState, sequence: Sequence, chunk: Chunk, stage: int, row: Row) -> None:
    """Applies a row that `stage` did not compute, by its status.

    MISS: the tokens that the stage lacks are sent again. INVALID: the sequence fails with InvalidRequest, or is tried again
    without draft tokens if it had any. Otherwise it begins again on another route.
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
    _settle(state, sequence)


def _lost(state: SchedulerState, sequence: Sequence, stage: int, status: Status) -> None:
    """Counts that `stage` lost KV of the sequence. Only a second loss at the same stage uses up retry budget.

    Does nothing while an earlier loss is being handled, because later chunks in flight report the same loss again.
    """
    if sequence.progress.failing or sequence.stream.over:
        return
    if stage in sequence.retry_budget.lost_at:
        sequence.retry_budget.failed()
        _suspect(state, sequence, f"stage {stage} answered {status} again")
    sequence.retry_budget.lost_at.add(stage)
    if status is Status.MISS:
        _replayed(state, sequence, str(status))


def _suspect(state: SchedulerState, sequence: Sequence, why: str, problem: type[Problem] = ReplaysExhausted) -> None:
    """Makes the sequence a suspect, which may have broken a stage. Ends it with `problem` if its retry budget is exhausted.

    why: the last failure, for the log and the client's error message.
    """
    state.suspects.add(sequence)
    if sequence.retry_budget.exhausted:
        attempts = sequence.retry_budget.failures
        _log.warning("%s: given up: %s", names_of([sequence]), why)
        sequence.stream.fail(problem(f"gave up after {attempts} attempts that came no further; the last: {why}"))


def _stage_failed(state: SchedulerState, instance: Instance, failure: StageFailed) -> None:
    """Gives the instance no work for a while. If only a client's deadline has passed, ends the sequences that are too late."""
    if failure.expired:
        state.expire(time.monotonic())
    else:
        state.last_failure = failure
        state.placement.avoid(instance)


def gateway_failed(state: SchedulerState, sequences: Iterable[Sequence]) -> None:
    """Ends these sequences with a Problem, because an unexpected error in the gateway left their state unknown."""
    for sequence in list(sequences):
        state.abandon(sequence, Problem("the gateway failed; its log has the traceback"))


# Stages replied to a reservation.


def reservation_over(state: SchedulerState, wanted: Reserve, reservation: Reservation) -> None:
    """Applies the replies to a reservation. Its sequences can now be computed, join the memory backlog, or begin again.

    All of them are in one micro-batch. Memory of those that have ended meanwhile is released.
    """
    for origin in reservation.origins:
        note_origin(state, origin)
    present, reasons = [], dict(zip(wanted.sequences, reservation.reasons, strict=True))
    for index, (sequence, row) in enumerate(zip(wanted.sequences, wanted.rows, strict=True)):
        if sequence.id in state.sequences:
            present.append((sequence, reservation.statuses[index], reservation.held[index], reservation.restoring[index]))
        else:
            state.release_row(wanted.instances, ReleaseRow(row.id, row.attempt))
    if reservation.failure is not None:
        # Nothing was computed yet, so it counts against no sequence.
        if present and present[0][0].route is not None:
            _stage_failed(state, present[0][0].route.instances[reservation.failure.stage], reservation.failure)
        for sequence, *_ in present:
            _start_again(state, sequence)
        return
    state.no_route_since = state.last_failure = None
    if Status.FULL in reservation.statuses:
        state.waiting.backlog.refused()
    for sequence, status, held, restoring in present:
        if status is not Status.OK:
            _reservation_refused(state, sequence, status, reasons[sequence])
            continue
        sequence.reserved = True
        sequence.restoring = restoring
        if sequence.handing_over is not None and not restoring:
            state.release_at((sequence.handing_over,), sequence)
            sequence.handing_over = None
        held_before = sequence.progress.held_everywhere
        for stage, tokens in enumerate(held, wanted.instances[0].stage):
            sequence.progress.found(stage, min(tokens, len(sequence.tokens) - 1))
        if sequence.leader is not None:
            stop_following(sequence, held_before)
        state.waiting.backlog.granted()
        _settle(state, sequence)
        if sequence.reserved and sequence.route is not None and reservation.caches_prefixes:
            state.where_held.put(sequence.reserved_chain, sequence.route.instances)
            if not wanted.migrates and not sequence.restoring:
                follow(sequence, state)


def _reservation_refused(state: SchedulerState, sequence: Sequence, status: Status, reason: str) -> None:
    """reason: why a stage cannot use the sequence's adapter; empty: memory is what it refuses."""
    if sequence.stream.over:
        state.dismiss(sequence)
    elif reason:
        state.dismiss(sequence, AdapterUnusable(reason))
    elif status is Status.FULL:
        state.take_out(sequence, had_memory=False)
        sequence.reserves_in_order = True
        state.waiting.backlog.add(sequence)
    elif status is Status.STALE:
        _start_again(state, sequence)
    elif sequence.shrink():
        state.put_back(sequence)
    elif sequence.has_drawn:
        sequence.stream.finish("length")
        state.dismiss(sequence)
    else:
        wanted = f"prompt and answer of {sequence.impossible_tokens} tokens"
        state.dismiss(sequence, InvalidRequest(f"{wanted} are more than a stage can ever hold; ask for fewer"))


# Beginning again.


def _settle(state: SchedulerState, sequence: Sequence) -> None:
    """If the sequence has no chunk in flight: dismisses it if it has ended, or queues it again if it must restart."""
    if not sequence.at_rest:
        return
    if sequence.stream.over:
        state.dismiss(sequence)
    elif sequence.must_restart:
        _start_again(state, sequence)


def _start_again(state: SchedulerState, sequence: Sequence) -> None:
    """Queues the sequence again, for another route. It counts as a replay if `broken_by` names a failure."""
    if sequence.broken_by is not None and not sequence.stream.over:
        sequence.waiting_since = time.monotonic()
        _replayed(state, sequence, sequence.broken_by)
    state.put_back(sequence)


def _replayed(state: SchedulerState, sequence: Sequence, cause: str) -> None:
    sequence.stream.replayed()
    state.stats.replays[cause] += 1
