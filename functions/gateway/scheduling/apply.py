"""Applies the replies of stages to the scheduler's state; the last stage's reply carries the new tokens.

The caller holds the scheduler's lock.
"""

import logging
import time
from collections.abc import Sequence as Items
from itertools import repeat
from typing import Final

from eventing.wire.events import Pooling, Result, Status
from eventing.wire.generation import TokenLogprob
from functions.gateway.scheduling.micro_batch import Step
from functions.gateway.scheduling.replays import replayed, row_failed, settle
from functions.gateway.scheduling.sequence import Chunk, Sequence
from functions.gateway.scheduling.state import SchedulerState
from functions.gateway.scheduling.stats import StageStats, seconds_on
from functions.gateway.stages.client import ForwardReply, ReplyOrigin
from functions.gateway.stages.failures import StageFailed
from functions.gateway.stages.routes import Instance

_log: Final = logging.getLogger(__name__)

_INCOMPLETE: Final = (
    "its reply lacks a token, a log-probability or a vector that was wanted, or accepts draft tokens that were not sent"
)


def stage_replied(state: SchedulerState, step: Step, stage: int, reply: ForwardReply, seconds: float) -> None:
    """Applies the reply of one stage to the sequences of `step`.

    `stage` is the stage's index, `seconds` the time from the request to the reply. The last stage's reply carries the new
    tokens. Raises StageFailed if that reply lacks a requested token, log-probability or vector, or accepts draft tokens that
    were not sent.
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
        if stage < step.trip.depth:
            state.prompt_token_bytes = len(reply.body) / sum(chunk.length for _, chunk in chunks)
    if stage == state.placement.num_stages - 1:
        for row, (sequence, chunk) in zip(rows, chunks, strict=True):
            if row.status is Status.OK and _is_incomplete(row.result, sequence, chunk):
                raise StageFailed(stage, "malformed", _INCOMPLETE, blames=True)
    for row, (sequence, chunk) in zip(rows, chunks, strict=True):
        if row.status is not Status.OK:
            row_failed(state, sequence, chunk, stage, row)
            continue
        sequence.progress.held[stage] = chunk.position + chunk.length
        if stage == step.trip.depth:
            _chunk_over(state, sequence, chunk, row.result)


def note_origin(state: SchedulerState, origin: ReplyOrigin, in_trip: Items[tuple[Sequence, Chunk]] = ()) -> None:
    """Records the free memory that an instance's reply states, and detects a restart of the instance.

    A new boot id means that the instance restarted and lost its KV. Its sequences are then computed again at this stage.
    `in_trip` has the rows of the reply. Their sequences are left out, because their statuses already say what was lost.
    """
    instance = origin.instance
    if instance.boot not in ("", origin.boot):
        told = {sequence for sequence, _ in in_trip}
        for batch in state.micro_batches:
            for sequence in batch.sequences if instance in batch.route.instances else ():
                if sequence.reserved and sequence not in told:
                    sequence.progress.missed(instance.stage, 0)
                    replayed(state, sequence, "rebooted")
    instance.replied(origin.boot, origin.free_tokens, origin.before, origin.lineage)


def _note_pass(stats: StageStats, instance: Instance, reply: ForwardReply) -> None:
    """Compares an instance's forward pass with the stage's quickest passes of the same size, and updates the instance's pace.

    Logs a warning when the instance becomes slow, or quick again.
    """
    stats.passes.step(reply.pass_tokens, reply.pass_seconds)
    # By all sizes: a slow instance gets small steps, which no other may have measured.
    quickest = seconds_on(stats.passes.points(), reply.pass_tokens) or reply.pass_seconds
    was_slow = instance.slow
    instance.passed(reply.pass_seconds, quickest, time.monotonic())
    if instance.slow is not was_slow:
        what = "as quick again as" if was_slow else f"{instance.pace:.1f} times as slow as"
        _log.warning("stage %d: passes of %s are %s the quickest there", instance.stage, instance.url, what)


def _chunk_over(state: SchedulerState, sequence: Sequence, chunk: Chunk, result: Result | None) -> None:
    """Applies a chunk that the last stage of its trip has computed: passes its tokens, scores or vector to the answer's stream.

    If the answer has filled its reservation, the sequence queues again for a larger one. If `result` is None, the row asked for
    no token, log-probability or vector.
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
    if sequence.stream.over or sequence.must_restart:
        settle(state, sequence)


def _pooled(state: SchedulerState, sequence: Sequence, chunk: Chunk, vector: bytes) -> None:
    """Adds the vector of a chunk to that of its prompt. Finishes the stream when the vector covers all tokens."""
    position, length = chunk.position, chunk.length
    if sequence.prompt.pooling is Pooling.LAST:
        position, length = 0, len(sequence.tokens)
    numbers = memoryview(vector).cast("f")
    if sequence.stream.pooled(position, length, numbers) == len(sequence.tokens):
        sequence.stream.finish("length")


def _drawn(state: SchedulerState, sequence: Sequence, drafted: int, tokens: Items[int], result: Result) -> None:
    """Applies `tokens` that the last stage drew: the accepted draft tokens, then one more token.

    `drafted` is the number of draft tokens that the chunk carried.
    """
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
    """Returns whether the last stage's result lacks something that the chunk asked for.

    This is so if a token, log-probability or vector is missing, or if the accepted draft tokens differ from those that were
    sent.
    """
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
