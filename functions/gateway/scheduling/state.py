"""The scheduler's state: all sequences, micro-batches, steps under way, and what must be sent to stages.

The scheduler's lock guards it, and it does no input or output. `decide` makes the changes that can happen next, `apply` those
that follow from the stages' replies.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial

from eventing.problems import DeadlineExceeded, PipelineUnavailable, Problem
from eventing.wire.control import ReleaseRow
from eventing.wire.prefix_chain import packed
from functions.gateway.scheduling.actions import Release
from functions.gateway.scheduling.batching import (
    FAR_SHARE,
    SchedulerLimits,
    micro_batches_allowed,
    micro_batches_that_fill,
    micro_batches_wanted,
)
from functions.gateway.scheduling.leases import LeaseRenewals
from functions.gateway.scheduling.micro_batch import MicroBatch, Step
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.scheduling.stats import StageStats, Stats
from functions.gateway.scheduling.waiting import BacklogSignals, WaitingSequences
from functions.gateway.scheduling.wake_up import WakeUps
from functions.gateway.stages.client import Trip
from functions.gateway.stages.routes import Instance, Placement
from functions.gateway.stages.where_held import WhereHeld


class SchedulerState:
    def __init__(self, placement: Placement, limits: SchedulerLimits) -> None:
        self.placement = placement
        self.limits = limits
        self.stats = Stats([StageStats() for _ in range(placement.num_stages)])
        self.sequences: dict[str, Sequence] = {}  # all that have not ended, by id
        self.waiting = WaitingSequences()
        self.micro_batches: list[MicroBatch] = []
        self.steps: dict[Trip, Step] = {}  # under way
        self.steps_begun = 0
        self.where_held = WhereHeld()
        self.no_route_since: float | None = None  # since when a stage has no instance for a new route, in time.monotonic()
        self.settling: MicroBatch | None = None  # migrated for balance; the next one waits until it has caught up
        self.suspects: set[Sequence] = set()  # sequences with failures since their last token
        self.trial: Sequence | None = None  # the suspect that runs alone now
        self.leases = LeaseRenewals()
        self.wake_ups = WakeUps()
        self.backlog_signals = BacklogSignals()
        self._abandoned: dict[str, int] = {}  # id → attempt of sequences that ended while a step still carried them
        self._releases: defaultdict[Instance, list[ReleaseRow]] = defaultdict(list)  # to be sent

    @property
    def running(self) -> int:
        """Sequences in micro-batches."""
        return sum([len(batch.sequences) for batch in self.micro_batches])

    @property
    def has_waiting(self) -> bool:
        """Some sequence is in no micro-batch."""
        return len(self.sequences) > sum([len(batch.sequences) for batch in self.micro_batches])

    @property
    def idle(self) -> bool:
        return not (self.sequences or self.steps or self._releases)

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

    def _is_far(self) -> bool:
        """The network takes so much of a round that other micro-batches should compute meanwhile."""
        network_seconds = sum([stage.network_seconds for stage in self.stats.stages])
        return network_seconds > FAR_SHARE * (sum([stage.service_seconds for stage in self.stats.stages]) - network_seconds)

    # The life of sequences and micro-batches.

    def end(self, sequence: Sequence, problem: Problem | None = None) -> None:
        """Ends `sequence` with `problem`, or as its stream has ended already, and frees its memory at once."""
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
        """Ends sequences whose deadline has passed, and those that have waited too long for a stage without an instance."""
        for sequence in [each for each in self.sequences.values() if each.deadline <= now and not each.stream.over]:
            seconds = sequence.prompt.deadline_seconds
            why = f"no complete answer within {seconds:g} seconds; ask for fewer tokens, or later"
            self.end(sequence, DeadlineExceeded(why))
        if self.no_route_since is None:
            return
        timeout = self.limits.cold_start_timeout_seconds
        for sequence in [each for since, each in self.without_route() if now - since >= timeout]:
            cold = ", ".join(map(str, self.placement.cold())) or "none"
            why = f"no route for {timeout:g} seconds; stages without an instance: {cold}"
            self.end(sequence, PipelineUnavailable(why))

    def without_route(self) -> list[tuple[float, Sequence]]:
        """Sequences that wait for a stage without an instance, and since when."""
        since = self.no_route_since
        return [] if since is None else [(max(since, each.waiting_since), each) for each in self.waiting]

    def dismiss(self, sequence: Sequence, problem: Problem | None = None) -> None:
        """Takes a sequence that ends out of its micro-batch. Only while none of its chunks is in flight."""
        if problem is not None:
            sequence.stream.fail(problem)
        self.take_out(sequence)
        self._forget(sequence)

    def abandon(self, sequence: Sequence, problem: Problem) -> None:
        """Ends a sequence after an error in the gateway. If a chunk is in flight, it is released again after that step."""
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
        """Takes a sequence out of its micro-batch, to wait or for good."""
        self.release(sequence, had_memory=had_memory)
        next(batch for batch in self.micro_batches if batch.route is sequence.route).drop(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queues a sequence of a micro-batch again, ahead of new ones, unless it has ended meanwhile."""
        self.take_out(sequence)
        if sequence.stream.over:
            self._forget(sequence)
        else:
            self.waiting.put_back(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self.sequences.pop(sequence.id, None)
        self.suspects.discard(sequence)
        if not self.sequences:
            self.no_route_since = None
        stream = sequence.stream
        self.stats.sequences[stream.problem.name if stream.problem else stream.finish_reason or "?"] += 1

    def step_over(self, trip: Trip) -> None:
        """The trip has ended, well or not, and its replies are applied."""
        step = self.steps.pop(trip)
        if step.micro_batch is not None:
            step.micro_batch.decoding = False
        for id_ in self._abandoned.keys() & step.chunks.keys() if self._abandoned else ():
            self.release_row(trip.instances, ReleaseRow(id_, self._abandoned[id_]))
            if not any(id_ in other.chunks for other in self.steps.values()):
                del self._abandoned[id_]

    # What must be sent.

    def release(self, sequence: Sequence, *, had_memory: bool = True) -> None:
        """Frees memory at every stage of the route, also at stages that did not reply: they may have got a lost event."""
        if sequence.route is None:
            return
        self.release_at(sequence.route.instances, sequence)
        if had_memory:
            self.where_held.put(sequence.prefix_chain(), sequence.route.instances)
            self.waiting.backlog.freed()

    def release_at(self, instances: Iterable[Instance], sequence: Sequence) -> None:
        self.release_row(instances, ReleaseRow(sequence.id, sequence.progress.attempt, packed(sequence.prefix_chain())))

    def release_row(self, instances: Iterable[Instance], row: ReleaseRow) -> None:
        """For a sequence that is no longer at these instances."""
        for instance in instances:
            self._releases[instance].append(row)

    def take_releases(self) -> list[Release]:
        releases = [Release(instance, rows) for instance, rows in self._releases.items()]
        self._releases.clear()
        return releases
