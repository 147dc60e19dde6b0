"""The scheduler's state: all sequences, micro-batches, steps under way, and what must be sent to stages.

The scheduler's lock guards the state. Nothing here does input or output. `decide` makes the changes that can happen next,
`apply` those that follow from the stages' replies.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Final

from eventing.problems import DeadlineExceeded, PipelineUnavailable, Problem
from eventing.wire.control import ReleaseRow
from eventing.wire.prefix_chain import Chain, packed
from functions.gateway.scheduling.batching import (
    FAR_SHARE,
    SchedulerLimits,
    lacking_instances,
    micro_batches_allowed,
    micro_batches_that_fill,
    micro_batches_wanted,
)
from functions.gateway.scheduling.leases import LeaseRenewals, Release
from functions.gateway.scheduling.micro_batch import MicroBatch, Step
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.scheduling.stats import StageStats, Stats
from functions.gateway.scheduling.waiting import BacklogSignals, WaitingSequences
from functions.gateway.scheduling.wake_up import WakeUps
from functions.gateway.stages.client import Trip
from functions.gateway.stages.failures import StageFailed
from functions.gateway.stages.routes import Instance, Placement
from functions.gateway.stages.where_held import WhereHeld

_DEMAND_SECONDS: Final = 0.1  # between two looks at all prompts that wait


class SchedulerState:
    def __init__(self, placement: Placement, limits: SchedulerLimits) -> None:
        self.placement = placement
        self.limits = limits
        self.stats = Stats([StageStats() for _ in range(placement.num_stages)])
        self.sequences: dict[str, Sequence] = {}  # all that have not ended, by id
        self.next_deadline = math.inf  # no sequence has an earlier one, in time.monotonic()
        self.waiting = WaitingSequences()
        self.micro_batches: list[MicroBatch] = []
        self.steps: dict[Trip, Step] = {}  # under way
        self.steps_begun = 0
        self.prompt_token_bytes = 0.0  # of a prompt token's hidden states on the way between stages; 0: none were seen yet
        self.last_prompt_step: dict[str, int] = {}  # by client, the number of the last step with a chunk of its prompts
        self.where_held = WhereHeld()
        self.no_route_since: float | None = None  # since when a stage has no instance for a new route, in time.monotonic()
        self.last_failure: StageFailed | None = None  # since the last reservation that a stage granted
        self.settling: MicroBatch | None = None  # the last one chosen for balance; the next is chosen after it has caught up
        self.suspects: set[Sequence] = set()  # sequences with failures since their last token
        self.trial: Sequence | None = None  # the suspect that runs alone now
        self.leases = LeaseRenewals()
        self.wake_ups = WakeUps()
        self.backlog_signals = BacklogSignals()
        self._lacking: list[int] = []  # see `lacking_instances`
        self._lacking_until = 0.0  # in time.monotonic()
        self._abandoned: dict[str, int] = {}  # id → attempt of sequences that ended while a step still carried them
        self.releases: defaultdict[Instance, list[ReleaseRow]] = defaultdict(list)  # to be sent

    @property
    def running(self) -> int:
        """Sequences in micro-batches."""
        return sum([len(batch.sequences) for batch in self.micro_batches])

    @property
    def has_waiting(self) -> bool:
        """Whether some sequence is in no micro-batch."""
        return len(self.sequences) > sum([len(batch.sequences) for batch in self.micro_batches])

    # How much work there may be.

    def micro_batches_allowed(self) -> int:
        stages = self.stats.stages
        network_seconds = [stage.network_seconds for stage in stages] if self._is_far() else ()
        return micro_batches_allowed(
            self.placement.ready_counts(), [stage.service_seconds for stage in stages], network_seconds
        )

    def micro_batches_wanted(self, sequences: int) -> int:
        stages_at_once = self.limits.stages_at_once or self.placement.num_stages
        allowed = self.micro_batches_allowed()
        filling = None
        if self._is_far():
            filling = partial(
                micro_batches_that_fill,
                maximum=allowed,
                stages_at_once=stages_at_once,
                costs=[stage.costs for stage in self.stats.stages],
                network_seconds=sum([stage.network_seconds for stage in self.stats.stages]),
            )
        return micro_batches_wanted(sequences, stages_at_once, self.limits.micro_batch_sequences, allowed, filling)

    def lacking_instances(self, now: float) -> list[int]:
        """Returns per stage how many instances it lacks to compute the waiting prompts in time.

        Computed anew every _DEMAND_SECONDS. `now` is in time.monotonic().
        """
        if now >= self._lacking_until:
            tokens = sum(len(sequence.tokens) for sequence in self.waiting)
            for batch in self.micro_batches:
                tokens += sum(len(each.tokens) - min(each.progress.held) - 1 for each in batch.sequences)
            seconds = [stage.prompt_token_seconds for stage in self.stats.stages]
            ready = self.placement.ready_counts()
            self._lacking = lacking_instances(tokens, seconds, ready, self.limits.prompt_seconds)
            self._lacking_until = now + _DEMAND_SECONDS
        return self._lacking

    def _is_far(self) -> bool:
        """Whether the network takes so large a share of a round that other micro-batches should compute meanwhile."""
        network_seconds = sum([stage.network_seconds for stage in self.stats.stages])
        return network_seconds > FAR_SHARE * (sum([stage.service_seconds for stage in self.stats.stages]) - network_seconds)

    # The life of sequences and micro-batches.

    def add(self, sequence: Sequence) -> None:
        self.sequences[sequence.id] = sequence
        self.next_deadline = min(self.next_deadline, sequence.deadline)
        self.waiting.queue.push(sequence)

    def end(self, sequence: Sequence, problem: Problem | None = None) -> None:
        """Ends a sequence and releases its memory.

        `problem` says why the sequence fails. If it is None, the sequence's stream has ended already. If a chunk of the
        sequence is in flight, it stays in its micro-batch until the chunk has returned.
        """
        if problem is not None:
            sequence.stream.fail(problem)
        if sequence.at_rest:
            self.dismiss(sequence)
        elif sequence.route is not None:
            self.release(sequence)
        else:
            self.waiting.remove(sequence)
            self._forget(sequence)

    def expire(self, now: float) -> None:
        """Ends sequences whose deadline has passed, and those that have waited too long for a stage without an instance.

        `now` is in time.monotonic().
        """
        if now >= self.next_deadline:  # looking at all sequences whenever anything happens would take long
            for sequence in [each for each in self.sequences.values() if each.deadline <= now and not each.stream.over]:
                seconds = sequence.prompt.deadline_seconds
                why = f"no complete answer within {seconds:g} seconds; ask for fewer tokens, or later"
                self.end(sequence, DeadlineExceeded(why))
            later = [each.deadline for each in self.sequences.values() if each.deadline > now]
            self.next_deadline = min(later, default=math.inf)
        if self.no_route_since is None:
            return
        timeout = self.limits.cold_start_timeout_seconds
        for sequence in [each for since, each in self.without_route() if now - since >= timeout]:
            cold = ", ".join(map(str, self.placement.cold())) or "none"
            why = f"no route for {timeout:g} seconds; stages without an instance: {cold}"
            if self.last_failure is not None:
                why += f"; the last failure: {self.last_failure}"
            self.end(sequence, PipelineUnavailable(why))

    def without_route(self) -> list[tuple[float, Sequence]]:
        """Returns (since, sequence) for each waiting sequence while a stage has no instance, otherwise an empty list.

        `since` is the start of this wait, in time.monotonic().
        """
        since = self.no_route_since
        return [] if since is None else [(max(since, each.waiting_since), each) for each in self.waiting]

    def dismiss(self, sequence: Sequence, problem: Problem | None = None) -> None:
        """Removes a sequence that ends and releases its memory. Call it only while none of its chunks is in flight.

        `problem` says why the sequence fails. If it is None, the sequence's stream has ended already.
        """
        if problem is not None:
            sequence.stream.fail(problem)
        self.take_out(sequence)
        self._forget(sequence)

    def abandon(self, sequence: Sequence, problem: Problem) -> None:
        """Ends a sequence whose state is unknown after an error in the gateway.

        Releases the sequence's memory at once, and once more after the last step that still carries the sequence.
        """
        if sequence.id not in self.sequences:
            return
        sequence.stream.fail(problem)
        if any(sequence.id in step.chunks for step in self.steps.values()):
            self._abandoned[sequence.id] = sequence.progress.attempt
        self.release(sequence)
        self.waiting.remove(sequence)
        for batch in self.micro_batches:
            if sequence in batch.sequences:
                batch.drop(sequence)
        self._forget(sequence)

    def take_out(self, sequence: Sequence, *, had_memory: bool = True) -> None:
        """Removes a sequence from its micro-batch and releases its memory. `had_memory` is as in `release`."""
        self.release(sequence, had_memory=had_memory)
        next(batch for batch in self.micro_batches if batch.route is sequence.route).drop(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Moves a sequence from its micro-batch to the queue, ahead of new sequences.

        If its retry time has not come, the sequence goes to the back-off instead. If it has ended meanwhile, it is removed.
        """
        self.take_out(sequence)
        if sequence.stream.over:
            self._forget(sequence)
        elif sequence.retry_budget.retry_at > time.monotonic():
            self.waiting.backing_off.append(sequence)
        else:
            self.waiting.queue.returned.append(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self.sequences.pop(sequence.id, None)
        self.suspects.discard(sequence)
        if not self.sequences:
            self.no_route_since = None
        stream = sequence.stream
        self.stats.sequences[stream.problem.name if stream.problem else stream.finish_reason or "?"] += 1

    def step_over(self, trip: Trip) -> None:
        """Removes the step of a trip that has ended, successfully or not.

        Call it after the trip's replies have been applied.
        """
        step = self.steps.pop(trip)
        if step.micro_batch is not None:
            step.micro_batch.decoding = False
        for id_ in self._abandoned.keys() & step.chunks.keys() if self._abandoned else ():
            self.release_row(trip.instances, ReleaseRow(id_, self._abandoned[id_]))
            if not any(id_ in other.chunks for other in self.steps.values()):
                del self._abandoned[id_]

    # What must be sent.

    def release(self, sequence: Sequence, *, had_memory: bool = True) -> None:
        """Queues the release of a sequence's memory at every stage of its route.

        Stages that did not reply are included, because a lost event may have reached them. `had_memory` says whether all stages
        had granted the memory.
        """
        if sequence.route is None:
            return
        left = () if sequence.handing_over is None else (sequence.handing_over,)
        self.release_at([*sequence.route.instances, *left], sequence)
        if had_memory:
            self.where_held.put(_left_chain(sequence), sequence.route.instances)
            self.waiting.backlog.freed()

    def release_at(self, instances: Iterable[Instance], sequence: Sequence) -> None:
        self.release_row(instances, ReleaseRow(sequence.id, sequence.progress.attempt, packed(_left_chain(sequence))))

    def release_row(self, instances: Iterable[Instance], row: ReleaseRow) -> None:
        """Queues the release of one row at these instances, for a sequence that no longer uses them."""
        for instance in instances:
            self.releases[instance].append(row)

    def take_releases(self) -> list[Release]:
        """Returns all queued releases, one for each instance, and clears the queue."""
        releases = [Release(instance, rows) for instance, rows in self.releases.items()]
        self.releases.clear()
        return releases


def _left_chain(sequence: Sequence) -> Chain:
    """Returns the prefix chain of the KV that a sequence leaves in prefix caches. Empty if it leaves none.

    While the sequence goes on, the KV is for itself. After its end, the KV is for other sequences, if they may share it.
    """
    return () if sequence.stream.over and not sequence.leaves_kv else sequence.prefix_chain()
