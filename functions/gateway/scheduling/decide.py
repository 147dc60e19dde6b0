"""Decides what the scheduler does next. `decide` makes all changes of the state that are possible now.

Nothing here does input or output. The caller holds the scheduler's lock.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Final

from functions.gateway.scheduling.admission import admit, reserve_again
from functions.gateway.scheduling.leases import Release
from functions.gateway.scheduling.micro_batch import MicroBatch, Step, level, make_step, prompt_chunks
from functions.gateway.scheduling.reservations import Reserve
from functions.gateway.scheduling.sequence import TRIAL_AFTER_FAILURES, Chunk, Sequence
from functions.gateway.scheduling.speculation import draft_lengths, step_seconds
from functions.gateway.scheduling.state import SchedulerState
from functions.gateway.scheduling.wake_up import PAUSE_SECONDS, AskStart, Wake
from functions.gateway.stages.client import Trip
from functions.gateway.stages.routes import Instance

# What `decide` asks the scheduler's threads to send: plain data, made while the lock is held and carried out without it.
Action = Trip | Reserve | Release | Wake | AskStart

_DUE_FACTOR: Final = 4  # of a prompt's own time; see `begin_prompt_steps`


def decide(state: SchedulerState, now: float) -> list[Action]:
    """Makes all changes of the state that are possible now, and returns what must be sent, in order.

    Sequences expire or leave their back-off; micro-batches migrate; sequences get memory; decode and prompt steps begin; cold
    stages are woken; memory is released. `now` is in time.monotonic().
    """
    state.expire(now)
    for sequence in [each for each in state.waiting.backing_off if each.retry_budget.retry_at <= now]:
        state.waiting.backing_off.remove(sequence)
        state.waiting.queue.returned.append(sequence)
    for batch in [batch for batch in state.micro_batches if not batch.sequences and not batch.decoding]:
        batch.route.close()
        state.micro_batches.remove(batch)
    migrate(state, now)
    actions: list[Action] = []
    if not state.micro_batches or now >= state.leases.renew_at:
        used = [instance for batch in state.micro_batches for instance in batch.route.instances]
        actions += state.leases.renew(used, state.sequences, now)
    for batch in state.micro_batches:
        waiting = [
            each for each in batch.sequences if each.restoring or each.leader is not None or each.handing_over is not None
        ]
        if waiting:
            actions += reserve_again(state, batch, waiting)
    if has_waiting := state.has_waiting:
        actions += admit(state, now)
        has_waiting = state.has_waiting
    if state.suspects or state.trial is not None:
        choose_trial(state)
    actions += begin_decode_steps(state)
    actions += begin_prompt_steps(state, now)
    stranded = [batch for batch in state.micro_batches if state.placement.strands(batch.route)]
    if now >= state.wake_ups.next_at and (stranded or has_waiting):
        first_round = state.no_route_since is None or now - state.no_route_since < PAUSE_SECONDS
        actions += state.wake_ups.begin(state.placement, all_stages=first_round)
    lacking = state.lacking_instances(now)
    if state.waiting.backlog.sequences or any(lacking):
        actions += state.backlog_signals.send(state.waiting.backlog, lacking, state.placement, now)
    actions += state.take_releases()
    return actions


def next_due(state: SchedulerState, now: float) -> float:
    """Returns the time at which `decide` must be called even if no reply comes before, in time.monotonic().

    Infinity if nothing is due.
    """
    due = [state.next_deadline]
    if state.has_waiting:
        timeout = state.limits.cold_start_timeout_seconds
        due += [since + timeout for since, _ in state.without_route()]
        due += [sequence.retry_budget.retry_at for sequence in state.waiting.backing_off]
        if state.waiting.backlog.sequences:
            due.append(state.waiting.backlog.retry_at)
        if not state.wake_ups.under_way:
            due.append(state.wake_ups.next_at)
    if state.micro_batches:
        due.append(state.leases.renew_at)
    due.append(state.placement.next_resumption(now))
    return min([moment for moment in due if moment > now], default=math.inf)


# Micro-batches migrate to other instances: from instances that leave, and for balance.


def migrate(state: SchedulerState, now: float) -> None:
    """Chooses which micro-batches migrate, and moves those that have nothing in flight.

    A micro-batch leaves one instance at a time. It leaves the next one only after the KV from the last one has arrived.
    """
    placement = state.placement
    _rebalance(state)
    for batch in state.micro_batches:
        if batch.target is not None and not batch.target.usable(now):
            batch.target = None
        leaving = placement.must_leave(batch.route)
        if leaving is not None and batch.target is None:
            state.stats.migrations["leaving"] += 1
        batch.target = leaving or batch.target
        while batch.target is not None and batch.at_rest and not any(each.handing_over for each in batch.sequences):
            _move(state, batch, batch.target)
            batch.target = placement.must_leave(batch.route)


def _rebalance(state: SchedulerState) -> None:
    """Moves micro-batches away from an instance that has many more routes than another instance of its stage.

    Micro-batches that hold nothing at the instance move at once. Otherwise they would wait there, after a restart, until the
    others are computed again. The others migrate one at a time. The next one is chosen after the last one has been computed
    again.
    """
    settling = state.settling if state.settling in state.micro_batches else None
    if settling is not None and settling.target is not None:
        return  # its route still counts at the instance that it leaves
    settled = settling is None or settling.caught_up
    for stage in range(state.placement.num_stages):
        while (unbalanced := state.placement.unbalanced(stage)) is not None:
            most, least = unbalanced
            using = [batch for batch in state.micro_batches if most in batch.route.instances and batch.target is None]
            empty = next((batch for batch in using if batch.holds_nothing(stage)), None)
            if empty is not None:
                _move(state, empty, least)
                state.stats.migrations["balance"] += 1
                continue
            movable = [batch for batch in using if settled and batch.caught_up]
            if movable:
                # The one with the fewest tokens, which may have to be computed again.
                state.settling = min(movable, key=lambda batch: sum(len(sequence.tokens) for sequence in batch.sequences))
                state.settling.target = least
                state.stats.migrations["balance"] += 1
                return
            break


def _move(state: SchedulerState, batch: MicroBatch, target: Instance) -> None:
    """Moves a micro-batch to the instance `target`, which replaces the instance of the same stage on its route.

    The micro-batch must have nothing in flight. The old instance keeps KV that `target` can fetch until `target` has fetched
    it. All other KV is restored or computed again. Sequences that still restore KV at other stages ask all stages again.
    """
    batch.target = None
    left = batch.route.replace(target)
    for sequence in batch.sequences:
        sequence.progress.missed(target.stage, 0)
        sequence.stream.replays += 1
        state.stats.replays["moved"] += 1
        if sequence.prefix_chain() and not (sequence.restoring or left.is_service or target.is_service):
            sequence.handing_over = left
        else:
            state.release_at((left,), sequence)


# Suspects run alone.


def choose_trial(state: SchedulerState) -> None:
    """Sets `state.trial` to a suspect with TRIAL_AFTER_FAILURES failures at one place, unless a trial is under way.

    The suspect then runs alone. If it breaks a stage again, no other sequence of this gateway is affected.
    """
    if state.trial is not None and (state.trial not in state.suspects or state.trial.route is None):
        state.trial = None
    if state.trial is None:
        for sequence in state.suspects:
            ready = sequence.retry_budget.failures_here >= TRIAL_AFTER_FAILURES and sequence.at_rest
            if ready and not sequence.stream.over:
                state.trial = sequence
                return


def may_send(state: SchedulerState, sequence: Sequence) -> bool:
    """Returns whether a step may carry this sequence now.

    During a trial, only the suspect on trial may be sent, and only once nothing else is in flight. Without a trial, every
    sequence may be sent that does not need one.
    """
    if state.trial is None:
        return sequence.retry_budget.failures_here < TRIAL_AFTER_FAILURES
    return sequence is state.trial and len(state.steps) == sequence.progress.in_flight


# Steps.


def begin_decode_steps(state: SchedulerState) -> list[Trip]:
    """Begins a decode step for each micro-batch that has none under way and does not migrate. Returns the steps' trips."""
    trips = []
    depth = state.placement.num_stages - 1
    too_many = len(state.micro_batches) > 1 and len(state.micro_batches) > state.micro_batches_wanted(state.running)
    for batch in list(state.micro_batches):
        if batch.decoding or batch.target is not None:
            continue
        if len(state.micro_batches) > 1:
            level(batch, state.micro_batches, too_many, state.limits.micro_batch_sequences)
        ready = [
            sequence
            for sequence in batch.sequences
            if not sequence.retry_budget.failures_here
            and sequence.decodes
            and (state.trial is None or may_send(state, sequence))
        ]
        if ready:
            drafts = choose_drafts(state, ready) if state.limits.draft_tokens else [()] * len(ready)
            chunks = [
                (sequence, Chunk(len(sequence.tokens) - 1, 1, depth, draft))
                for sequence, draft in zip(ready, drafts, strict=True)
            ]
            trips.append(_begin(state, make_step(chunks, batch.route.instances, batch)))
    return trips


def choose_drafts(state: SchedulerState, sequences: list[Sequence]) -> list[tuple[int, ...]]:
    """Returns the draft tokens to send for each sequence of a decode step: as many as should raise the tokens per second."""
    limit = state.limits.draft_tokens
    drafts: list[tuple[int, ...]] = []
    for sequence in sequences:
        # With the token that is drawn in any case, no more than the answer may still have.
        possible = min(limit, sequence.reserve_tokens - len(sequence.tokens) - 1)
        drafts.append(() if sequence.drafter is None else sequence.drafter.draft(possible))
    if not any(drafts):
        return drafts
    chances = [0.0 if sequence.drafter is None else sequence.drafter.chance for sequence in sequences]
    stages = state.stats.stages
    micro_batches = sum([1 for batch in state.micro_batches if batch.sequences])
    network_seconds = sum([stage.network_seconds for stage in stages])
    seconds = step_seconds([stage.costs for stage in stages], micro_batches, network_seconds)
    lengths = draft_lengths([(len(draft), chance) for draft, chance in zip(drafts, chances, strict=True)], seconds)
    return [draft[:length] for draft, length in zip(drafts, lengths, strict=True)]


def begin_prompt_steps(state: SchedulerState, now: float) -> list[Trip]:
    """Begins a prompt step at each first stage that is free for one. Returns the trips of these steps.

    Clients take turns. Of a client's prompts, the one that is due first is next, and the step carries others that fit in. A
    prompt is due when it has waited _DUE_FACTOR times as long as its own tokens take at the slowest stage. So short prompts
    overtake long ones, and long ones do not starve.

    Suspended instances, which have just failed, get no prompt step. Suspects are sent one by one, and each would use up retry
    budget there.

    No step begins while hidden states of prompt steps under way may take `prompt_bytes` of the gateway's memory. If a later
    stage is slower than the first, such steps wait for it at the gateway.
    """
    prompts_of: dict[tuple[Instance, ...], list[Sequence]] = {}
    for batch in state.micro_batches:
        instances = batch.route.instances
        if batch.target is not None or not instances[0].prompts.idle:
            continue
        if max([instance.suspended_until for instance in instances]) <= now:
            prompts = [sequence for sequence in batch.sequences if _has_prompt_chunk(state, sequence)]
            if prompts:
                prompts_of.setdefault(instances, []).extend(prompts)
    if not prompts_of:
        return []
    under_way = sum(
        chunk.length for step in state.steps.values() if step.micro_batch is None for _, chunk in step.chunks.values()
    )
    if under_way * state.prompt_token_bytes >= state.limits.prompt_bytes:
        return []
    last_step = state.last_prompt_step = _last_prompt_steps(state)
    token_seconds = max(stage.prompt_token_seconds for stage in state.stats.stages) or 1.0  # unknown: the shortest is next

    def due(sequence: Sequence) -> float:
        lacking = len(sequence.tokens) - min(sequence.progress.held)
        return sequence.waiting_since + _DUE_FACTOR * token_seconds * lacking

    def turn(item: tuple[tuple[Instance, ...], list[Sequence]]) -> tuple[int, float]:
        first = item[1][0]
        return last_step[first.prompt.client_id], due(first)

    in_turn = {route: _by_turns(sorted(prompts, key=due), last_step) for route, prompts in prompts_of.items()}
    trips = []
    for route, prompts in sorted(in_turn.items(), key=turn):
        if route[0].prompts.idle:  # may have changed: routes can share their first stage
            chunks = prompt_chunks(prompts, state.limits.chunk_tokens)
            if chunks:
                trips.append(_begin(state, make_step(chunks, route, None)))
    return trips


def _last_prompt_steps(state: SchedulerState) -> dict[str, int]:
    """Returns for each client the number of the last step that carried a chunk of its prompts.

    Only clients with sequences in micro-batches are included. A client without such a step gets the number of the last step
    before its first sequence joined.
    """
    last_step: dict[str, int] = {}
    for batch in state.micro_batches:
        for sequence in batch.sequences:
            client_id = sequence.prompt.client_id
            joined = min(sequence.last_chunk_step, last_step.get(client_id, sequence.last_chunk_step))
            last_step[client_id] = state.last_prompt_step.get(client_id, joined)
    return last_step


def _by_turns(prompts: list[Sequence], last_step: Mapping[str, int]) -> list[Sequence]:
    """Orders `prompts` so that clients take turns: the first of each client, then the second of each client, and so on.

    Each client's prompts keep their order. In each round, the client whose last prompt step is oldest goes first.
    """
    taken: Counter[str] = Counter()
    order: list[tuple[int, int, Sequence]] = []
    for sequence in prompts:
        client_id = sequence.prompt.client_id
        order.append((taken[client_id], last_step[client_id], sequence))
        taken[client_id] += 1
    return [sequence for _, _, sequence in sorted(order, key=lambda each: each[:2])]


def _has_prompt_chunk(state: SchedulerState, sequence: Sequence) -> bool:
    """Returns whether a prompt chunk of the sequence may be sent now. It may have one chunk in flight for each stage."""
    if not sequence.reserved or sequence.restoring or sequence.leader is not None:
        return False
    if sequence.must_restart or sequence.stream.over or min(sequence.progress.sent) >= len(sequence.tokens):
        return False
    if sequence.progress.in_flight >= state.placement.num_stages or not may_send(state, sequence):
        return False
    return sequence.retry_budget.failures_here > 0 or not sequence.decodes


def _begin(state: SchedulerState, step: Step) -> Trip:
    """Records in the state, the statistics and the sequences that `step` is sent now. Returns the step's trip."""
    is_prompt = step.micro_batch is None
    if step.micro_batch is not None:
        step.micro_batch.decoding = True
    else:
        step.trip.instances[0].prompts.queue()
    state.steps[step.trip] = step
    state.steps_begun += 1
    for sequence, chunk in step.chunks.values():
        sequence.progress.send(chunk)
        if sequence.stream.started(chunk.position):
            state.stats.cached_tokens += chunk.position
        if is_prompt:
            sequence.last_chunk_step = state.last_prompt_step[sequence.prompt.client_id] = state.steps_begun
        prompt_tokens = min(chunk.position + chunk.length, len(sequence.prompt.token_ids)) - chunk.position
        if prompt_tokens > 0:
            state.stats.prompt_tokens += prompt_tokens
    return step.trip
