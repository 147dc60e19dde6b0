"""The state of all sequences, and what replies do to it. No thread, no network: the scheduler's lock is held around it.

What to do next is the planner's; how it is done the scheduler's.
"""

import bisect
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from eventing.problems import DeadlineExceeded, InvalidRequest, PipelineUnavailable, Problem, ReplaysExhausted
from eventing.wire.control import ReleaseRow
from eventing.wire.events import Row, Status
from functions.gateway.scheduling.admission import FairQueue
from functions.gateway.scheduling.job import Job
from functions.gateway.scheduling.micro_batch import MicroBatch
from functions.gateway.scheduling.progress import Piece
from functions.gateway.scheduling.stats import StageStats, Stats
from functions.gateway.stages.client import Answerer, ForwardReply, StageFailed
from functions.gateway.stages.routes import Instance, Placement
from functions.gateway.stages.trip import Trip

_FIRST_MEMORY_PAUSE_SECONDS: Final = 0.02
_LONGEST_MEMORY_PAUSE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What the configuration allows; the meanings stand there."""

    queue_limit: int = 256
    chunk_tokens: int = 256
    micro_batch_sequences: int = 8
    stages_at_once: int = 0
    cold_start_timeout_seconds: float = 300.0


@dataclass(slots=True)
class Reservation:
    """What became of a reservation for several jobs on all stages of a route."""

    statuses: list[Status]
    """Per job, the worst of all stages."""
    answerers: list[Answerer]
    failure: StageFailed | None = None
    """A stage gave no answer: then no status counts."""


@dataclass(slots=True)
class Memory:
    """Sequences that were told that a stage is full: one after the other, nobody overtakes them."""

    hungry: list[Job] = field(default_factory=list)
    """In the order in which they came to the gateway."""
    retry_at: float = 0.0
    pause_seconds: float = _FIRST_MEMORY_PAUSE_SECONDS

    def was_full(self) -> None:
        """The next try comes later each time, and not at the moment when another gateway comes too."""
        self.retry_at = time.monotonic() + self.pause_seconds * random.uniform(0.5, 1.5)
        self.pause_seconds = min(_LONGEST_MEMORY_PAUSE_SECONDS, 2 * self.pause_seconds)

    def freed(self) -> None:
        self.retry_at = 0.0
        self.pause_seconds = _FIRST_MEMORY_PAUSE_SECONDS


class Board:
    def __init__(self, placement: Placement, limits: Limits) -> None:
        self.placement = placement
        self.limits = limits
        self.stats = Stats([StageStats() for _ in range(placement.num_stages)])
        self.jobs: set[Job] = set()
        """All that have not ended."""
        self.queue: FairQueue[Job] = FairQueue()
        self.paced: list[Job] = []
        """Replays that wait for their time."""
        self.memory = Memory()
        self.micro_batches: list[MicroBatch] = []
        self.trips = 0
        self.suspects: set[Job] = set()
        self.no_route_since: float | None = None
        self.releases: defaultdict[Instance, list[ReleaseRow]] = defaultdict(list)
        """To be sent."""

    @property
    def running(self) -> int:
        return sum(len(micro_batch.jobs) for micro_batch in self.micro_batches)

    @property
    def waiting(self) -> int:
        return len(self.queue) + len(self.paced) + len(self.memory.hungry)

    def waiting_jobs(self) -> list[Job]:
        return [*self.queue, *self.paced, *self.memory.hungry]

    # Sequences come and go.

    def submit(self, job: Job) -> None:
        self.jobs.add(job)
        self.queue.push(job)

    def end(self, job: Job, problem: Problem | None = None) -> None:
        """Ends `job` with `problem`, or as its sequence has ended already. Its memory is freed at once."""
        if problem is not None:
            job.sequence.fail(problem)
        if job.at_rest:
            self._leave(job)
        elif job.micro_batch is not None:
            self._release(job)
        else:
            self._remove_waiting(job)
            self._forget(job)

    def expire(self, now: float) -> None:
        """Ends what took too long."""
        for job in [job for job in self.jobs if job.sequence.deadline <= now and not job.sequence.over]:
            seconds = job.sequence.deadline_seconds
            self.end(job, DeadlineExceeded(f"no complete answer within {seconds:g} seconds; ask for fewer tokens, or later"))
        if self.no_route_since is not None:
            timeout = self.limits.cold_start_timeout_seconds
            for job in self.waiting_jobs():
                if now - max(self.no_route_since, job.waiting_since) >= timeout:
                    cold = ", ".join(map(str, self.placement.cold())) or "none"
                    self.end(job, PipelineUnavailable(f"no route for {timeout:g} seconds; stages without an instance: {cold}"))

    def fail_waiting(self, problem: Problem) -> None:
        """Nobody who waits can be served."""
        for job in self.waiting_jobs():
            self.end(job, problem)

    # Memory.

    def reserved(self, jobs: Sequence[Job], reservation: Reservation) -> None:
        """The answer to the reservation for `jobs`, which are in one micro-batch."""
        for answerer in reservation.answerers:
            self.heard(answerer)
        failure = reservation.failure
        if failure is not None:
            if jobs and jobs[0].micro_batch is not None:
                self.placement.broke(jobs[0].micro_batch.route.instances[failure.stage])
            for job in jobs:
                self._requeue(job, None)
            return
        self.no_route_since = None
        if Status.FULL in reservation.statuses:
            self.memory.was_full()
        for job, status in zip(jobs, reservation.statuses, strict=True):
            if status is Status.OK:
                job.reserved = True
                self.memory.pause_seconds = _FIRST_MEMORY_PAUSE_SECONDS
                self._settle(job)
            elif job.sequence.over:
                self._leave(job)
            elif status is Status.FULL:
                self._go_hungry(job)
            elif status is Status.STALE:
                self._requeue(job, None)
            else:
                wanted = f"prompt and answer of {job.reserve_tokens} tokens"
                self._leave(job, InvalidRequest(f"{wanted} are more than a stage can ever hold; ask for fewer"))

    def _go_hungry(self, job: Job) -> None:
        self._release(job, frees=False)
        job.leave()
        job.one_by_one = True
        bisect.insort(self.memory.hungry, job, key=lambda other: other.number)

    # Replies.

    def heard(self, answerer: Answerer, in_trip: Iterable[Job] = ()) -> None:
        """Notes who answered. After a new boot all held there is lost; the rows of those `in_trip` say so themselves."""
        instance = answerer.instance
        if instance.boot not in ("", answerer.boot):
            excepted = set(in_trip)
            for job in self._jobs_at(instance):
                if job.reserved and job not in excepted:
                    job.progress.missed(instance.stage, 0)
                    job.sequence.replayed()
                    self.stats.replays["rebooted"] += 1
        instance.answered(answerer.boot, answerer.free_tokens)

    def answered(self, trip: Trip, stage: int, reply: ForwardReply, seconds: float) -> list[int]:
        """See `trip.TripLog`. Raises StageFailed where the last stage owes a token."""
        rows = reply.batch.rows
        self.heard(reply.answerer, (job for job, _ in trip.pieces))
        self.stats.stages[stage].step(seconds, trip.micro_batch is not None)
        last = stage == self.placement.num_stages - 1
        if last and any(_owes_token(row, job, piece) for row, (job, piece) in zip(rows, trip.pieces, strict=True)):
            raise StageFailed(stage, "malformed", "its reply lacks a token that was wanted", blames=True)
        goes_on = []
        pieces, trip.pieces = trip.pieces, []
        for index, (row, (job, piece)) in enumerate(zip(rows, pieces, strict=True)):
            if row.status is not Status.OK:
                self._row_failed(job, stage, row)
                continue
            job.progress.computed(stage, piece)
            if stage < trip.depth:
                goes_on.append(index)
                trip.pieces.append((job, piece))
            else:
                self._arrived(job, row)
        return goes_on

    def broke(self, trip: Trip, failure: StageFailed) -> None:
        self.placement.broke(trip.instances[failure.stage])
        pieces, trip.pieces = trip.pieces, []
        for job, piece in pieces:
            if (failure.blames or failure.final) and not (job.must_restart or job.sequence.over):
                job.broke(failure.stage, piece)
                self._suspect(job, str(failure), PipelineUnavailable if failure.final else ReplaysExhausted)
            job.progress.failed()
            job.must_restart = True
            job.progress.settle()
            self._settle(job, failure.cause)

    def over(self, trip: Trip) -> None:
        """The trip's thread has nothing more to do for it."""
        self.trips -= 1
        if trip.micro_batch is not None:
            trip.micro_batch.decoding = False

    def _jobs_at(self, instance: Instance) -> list[Job]:
        return [job for batch in self.micro_batches if instance in batch.route.instances for job in batch.jobs]

    def _arrived(self, job: Job, row: Row) -> None:
        job.progress.settle()
        if row.result is not None and row.result.token is not None:
            self.stats.tokens += 1
            job.came_further()
            self.suspects.discard(job)
            job.sequence.put(row.result.token)
        self._settle(job)

    def _row_failed(self, job: Job, stage: int, row: Row) -> None:
        if row.status is Status.INVALID:
            job.sequence.fail(InvalidRequest(row.reason or f"stage {stage} refuses the sequence"))
        elif row.status in (Status.MISS, Status.STALE):
            self._lost(job, stage, row.status)
        if row.status is Status.MISS:
            job.progress.missed(stage, row.held or 0)
        else:
            job.progress.failed()
            job.must_restart = True
        job.progress.settle()
        self._settle(job, str(row.status))

    def _lost(self, job: Job, stage: int, cause: str) -> None:
        """`stage` has lost what it held of `job`: forgiven the first time. Chunks behind the first one say the same again."""
        if job.progress.failing or job.sequence.over:
            return
        if stage in job.missed_at:
            job.strike()
            self._suspect(job, f"stage {stage} answered {cause} again")
        job.missed_at.add(stage)
        if cause == Status.MISS:
            job.sequence.replayed()
            self.stats.replays[cause] += 1

    def _suspect(self, job: Job, why: str, problem: type[Problem] = ReplaysExhausted) -> None:
        self.suspects.add(job)
        if job.exhausted:
            job.sequence.fail(problem(f"gave up after {job.breaks} attempts that came no further; the last: {why}"))

    # Leaving a micro-batch.

    def _settle(self, job: Job, cause: str | None = None) -> None:
        """Once nothing of `job` is on its way: takes it away if it has ended, starts it again if its route broke."""
        if not job.at_rest:
            return
        if job.sequence.over:
            self._leave(job)
        elif job.must_restart:
            self._requeue(job, cause)

    def _leave(self, job: Job, problem: Problem | None = None) -> None:
        if problem is not None:
            job.sequence.fail(problem)
        self._release(job)
        job.leave()
        self._forget(job)

    def _requeue(self, job: Job, cause: str | None) -> None:
        """Starts `job` again on another route. `cause` None: it had computed nothing yet."""
        self._release(job)
        job.leave()
        if job.sequence.over:
            self._forget(job)
            return
        if cause is not None:
            job.waiting_since = time.monotonic()
            job.sequence.replayed()
            self.stats.replays[cause] += 1
        if job.replay_at > time.monotonic():
            self.paced.append(job)
        else:
            self.queue.push_returned(job)

    def _release(self, job: Job, *, frees: bool = True) -> None:
        """At every stage of its route, also where nothing is held: whether a lost event arrived is not known."""
        if job.micro_batch is not None:
            for instance in job.micro_batch.route.instances:
                self.releases[instance].append(ReleaseRow(job.id, job.progress.attempt))
            if frees:
                self.memory.freed()

    def _remove_waiting(self, job: Job) -> None:
        if not self.queue.remove(job):
            for waiting in (self.paced, self.memory.hungry):
                if job in waiting:
                    waiting.remove(job)

    def _forget(self, job: Job) -> None:
        self.jobs.discard(job)
        self.suspects.discard(job)
        sequence = job.sequence
        self.stats.sequences[sequence.problem.name if sequence.problem else sequence.finish_reason or "?"] += 1


def _owes_token(row: Row, job: Job, piece: Piece) -> bool:
    wanted = row.status is Status.OK and piece.end == job.total_tokens
    return wanted and (row.result is None or row.result.token is None)
