"""The state of all sequences: who waits, who is in which micro-batch, what is on its way. No thread, no network.

The scheduler's lock is held around it, and around all that reads and changes it: `replies` and `failures` (what came back),
`moves`, `admission`, `next_steps` and `wake_ups` (what happens next).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial

from eventing.problems import Problem
from eventing.wire.control import ReleaseRow
from eventing.wire.prefix_chain import packed
from functions.gateway.scheduling.actions import Release
from functions.gateway.scheduling.capacity import FAR, micro_batches_allowed, micro_batches_that_fill, micro_batches_wanted
from functions.gateway.scheduling.limits import Limits
from functions.gateway.scheduling.micro_batch import MicroBatch
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.scheduling.stats import StageStats, Stats
from functions.gateway.scheduling.step import Step
from functions.gateway.scheduling.waiting import Waiting
from functions.gateway.stages.instances import Instance
from functions.gateway.stages.routes import Placement
from functions.gateway.stages.trip import Trip
from functions.gateway.stages.where_held import WhereHeld


class Board:
    def __init__(self, placement: Placement, limits: Limits) -> None:
        self.placement = placement
        self.limits = limits
        self.stats = Stats([StageStats() for _ in range(placement.num_stages)])
        self.sequences: dict[str, Sequence] = {}
        """All that have not ended, by id."""
        self.waiting = Waiting()
        self.micro_batches: list[MicroBatch] = []
        self.steps: dict[Trip, Step] = {}
        """On their way."""
        self.steps_begun = 0
        self.where_held = WhereHeld()
        self.suspects: set[Sequence] = set()
        """With a strike against them."""
        self.no_route_since: float | None = None
        self._abandoned: dict[str, int] = {}
        """Ids and attempts of sequences that are gone while something of theirs may still be on its way."""
        self._releases: defaultdict[Instance, list[ReleaseRow]] = defaultdict(list)
        """To be sent."""

    @property
    def running(self) -> int:
        return sum(len(batch.sequences) for batch in self.micro_batches)

    @property
    def idle(self) -> bool:
        """There is no sequence, nothing is on its way, and nothing is to be released."""
        return not (self.sequences or self.steps or self._releases)

    def sequences_at(self, instance: Instance) -> Iterator[Sequence]:
        for batch in self.micro_batches:
            if instance in batch.route.instances:
                yield from batch.sequences

    def micro_batches_allowed(self) -> int:
        stages = self.stats.stages
        ways = [stage.network_seconds for stage in stages] if self._is_far else ()
        return micro_batches_allowed(self.placement.ready_counts(), [stage.service_seconds for stage in stages], ways)

    def micro_batches_wanted(self, sequences: int) -> int:
        stages_at_once = self.limits.stages_at_once or self.placement.num_stages
        allowed = self.micro_batches_allowed()
        filling = partial(self._that_fill, allowed, stages_at_once) if self._is_far else None
        return micro_batches_wanted(sequences, stages_at_once, self.limits.micro_batch_sequences, allowed, filling)

    def _that_fill(self, allowed: int, stages_at_once: int, sequences: int, least: int) -> int:
        stages = self.stats.stages
        network_seconds = sum(stage.network_seconds for stage in stages)
        return micro_batches_that_fill(
            sequences, least, allowed, stages_at_once, [stage.costs for stage in stages], network_seconds
        )

    @property
    def _is_far(self) -> bool:
        """Whether the network takes enough of a round to compute others' meanwhile."""
        stages = self.stats.stages
        network_seconds = sum(stage.network_seconds for stage in stages)
        return network_seconds > FAR * (sum(stage.service_seconds for stage in stages) - network_seconds)

    # Sequences come and go.

    def submit(self, sequence: Sequence) -> None:
        self.sequences[sequence.id] = sequence
        self.waiting.queue.push(sequence)

    def end(self, sequence: Sequence, problem: Problem | None = None) -> None:
        """Ends `sequence` with `problem`, or as its stream has ended already. Its memory is freed at once."""
        if problem is not None:
            sequence.stream.fail(problem)
        if sequence.at_rest:
            self.dismiss(sequence)
        elif sequence.route is not None:
            self.release(sequence)
        else:
            self.waiting.remove(sequence)
            self._forget(sequence)

    def dismiss(self, sequence: Sequence, problem: Problem | None = None) -> None:
        """Takes a sequence that has ended, or ends with `problem`, out of its micro-batch. Only while nothing is on its way."""
        if problem is not None:
            sequence.stream.fail(problem)
        self.take_out(sequence)
        self._forget(sequence)

    def abandon(self, sequence: Sequence, problem: Problem) -> None:
        """Takes out one of which nobody knows any more what is on its way; where that comes back, it is released again."""
        if sequence.id not in self.sequences:
            return
        sequence.stream.fail(problem)
        if any(sequence.id in step.pieces for step in self.steps.values()):
            self._abandoned[sequence.id] = sequence.progress.attempt
        self.release(sequence)
        self.waiting.remove(sequence)
        for batch in self.micro_batches:
            if sequence in batch.sequences:
                batch.part_with(sequence)
        self._forget(sequence)

    def take_out(self, sequence: Sequence, *, frees: bool = True) -> None:
        """Out of its micro-batch; to wait again, or for good. frees: whether it held memory, so that others may hope."""
        self.release(sequence, frees=frees)
        next(batch for batch in self.micro_batches if batch.route is sequence.route).part_with(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Out of its micro-batch and to the front of those who wait, unless it has ended meanwhile."""
        self.take_out(sequence)
        if sequence.over:
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

    # Memory is given back.

    def release(self, sequence: Sequence, *, frees: bool = True) -> None:
        """At every stage of its route, also where nothing is held: whether a lost event arrived is not known."""
        if sequence.route is not None:
            for instance in sequence.route.instances:
                self.release_at(instance, sequence)
            if frees:
                self.where_held.put(sequence.known(), sequence.route.instances)
                self.waiting.hungry.was_freed()

    def release_at(self, instance: Instance, sequence: Sequence) -> None:
        self._releases[instance].append(ReleaseRow(sequence.id, sequence.progress.attempt, packed(sequence.known())))

    def release_row(self, instances: Iterable[Instance], row: ReleaseRow) -> None:
        """For a sequence that is gone already."""
        for instance in instances:
            self._releases[instance].append(row)

    def release_rows(self, instance: Instance, rows: Iterable[ReleaseRow]) -> None:
        """Of sequences that have left `instance`."""
        self._releases[instance].extend(rows)

    def take_releases(self) -> list[Release]:
        releases = [Release(instance, rows) for instance, rows in self._releases.items()]
        self._releases.clear()
        return releases

    # Steps and micro-batches.

    def step_begins(self, step: Step) -> None:
        self.steps[step.trip] = step
        if step.micro_batch is not None:
            step.micro_batch.decoding = True
        self.steps_begun += 1

    def step_ends(self, trip: Trip) -> None:
        """The thread that walked it has nothing more to do for it."""
        step = self.steps.pop(trip)
        if step.micro_batch is not None:
            step.micro_batch.decoding = False
        for id_ in self._abandoned.keys() & step.pieces.keys():
            self.release_row(trip.instances, ReleaseRow(id_, self._abandoned[id_]))
            if not any(id_ in other.pieces for other in self.steps.values()):
                del self._abandoned[id_]

    def close_empty(self) -> None:
        for batch in [batch for batch in self.micro_batches if not batch.sequences and not batch.decoding]:
            batch.route.close()
            self.micro_batches.remove(batch)
