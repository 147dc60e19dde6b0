"""What to do next, given the board: moves, admission, decode steps, prompt chunks, wake-ups, releases.

Called with the scheduler's lock held whenever something has happened; its answer is carried out by the scheduler.
"""

import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Final

from eventing.wire.control import ReleaseRow
from functions.gateway.scheduling.admission import micro_batches_allowed, micro_batches_wanted
from functions.gateway.scheduling.board import Board
from functions.gateway.scheduling.job import ON_TRIAL_AT, Job
from functions.gateway.scheduling.micro_batch import MicroBatch, level, prompt_pieces
from functions.gateway.scheduling.progress import Piece
from functions.gateway.stages.routes import Instance
from functions.gateway.stages.trip import Trip

WAKE_PAUSE_SECONDS: Final = 0.5
"""Between two rounds of warm-up events; also how long the watch may lag behind a stage that has answered one."""


@dataclass(frozen=True, slots=True)
class Walk:
    trip: Trip


@dataclass(frozen=True, slots=True)
class Reserve:
    micro_batch: MicroBatch
    jobs: list[Job]
    one_by_one: bool
    """Stage after stage in order, so that of two gateways one always comes through."""


@dataclass(frozen=True, slots=True)
class Release:
    instance: Instance
    rows: list[ReleaseRow]


@dataclass(frozen=True, slots=True)
class Wake:
    """Warm-up events to these stages, all at once."""

    stages: list[int]


Action = Walk | Reserve | Release | Wake


class Planner:
    def __init__(self, board: Board) -> None:
        self._board = board
        self._trial: Job | None = None
        self._settling: MicroBatch | None = None
        """Moved for balance and not caught up yet: one at a time."""
        self._waking = False
        self._wake_at = 0.0
        self._trips = 0

    # Admission.

    def room(self) -> int:
        """Sequences that could be taken into micro-batches now, beyond those that are."""
        return self._allowed() * self._board.limits.micro_batch_sequences - self._board.running

    def next_actions(self) -> list[Action]:
        now = time.monotonic()
        board = self._board
        board.expire(now)
        self._resume(now)
        self._close_empty()
        self._move(now)
        actions: list[Action] = [*self._admit(now)]
        self._choose_trial()
        actions += [Walk(trip) for trip in self._decode_steps()]
        actions += [Walk(trip) for trip in self._prompt_steps(now)]
        actions += self._wake(now)
        actions += [Release(instance, rows) for instance, rows in board.releases.items()]
        board.releases.clear()
        return actions

    def next_due(self) -> float | None:
        """When to look again although nothing has happened, in time.monotonic(); None: never."""
        board = self._board
        due = [job.sequence.deadline for job in board.jobs]
        due += [job.replay_at for job in board.paced]
        due += [resumption] if (resumption := board.placement.next_resumption()) is not None else []
        if board.memory.hungry:
            due.append(board.memory.retry_at)
        if board.waiting:
            due += [] if self._waking else [self._wake_at]
            if board.no_route_since is not None:
                oldest = min(max(board.no_route_since, job.waiting_since) for job in board.waiting_jobs())
                due.append(oldest + board.limits.cold_start_timeout_seconds)
        now = time.monotonic()
        return min((moment for moment in due if moment > now), default=None)

    def wake_over(self) -> None:
        """All warm-up events of a round were answered, or failed."""
        self._waking = False
        self._wake_at = time.monotonic() + WAKE_PAUSE_SECONDS

    def _resume(self, now: float) -> None:
        board = self._board
        if not board.jobs:
            board.no_route_since = None
        for job in [job for job in board.paced if job.replay_at <= now]:
            board.paced.remove(job)
            board.queue.push_returned(job)

    @property
    def _stages_at_once(self) -> int:
        return self._board.limits.stages_at_once or self._board.placement.num_stages

    def _allowed(self) -> int:
        board = self._board
        seconds = [stage.service_seconds for stage in board.stats.stages]
        return micro_batches_allowed(board.placement.ready_counts(), seconds)

    def _admit(self, now: float) -> Iterator[Reserve]:
        """Takes sequences out of the queue, as many as capacity and memory allow, and asks for their memory."""
        board = self._board
        if any(job.one_by_one for batch in board.micro_batches for job in batch.jobs if not job.reserved):
            return  # Whoever comes behind it would take what it is asking for.
        if board.memory.hungry:
            yield from self._admit_hungry(now)
            return
        # One reservation at a time for each micro-batch: those who come meanwhile share the next one. A burst of requests
        # would otherwise be as many events at every stage, which its autoscaler takes for load.
        reserving = {batch for batch in board.micro_batches if not all(job.reserved for job in batch.jobs)}
        groups: dict[MicroBatch, list[Job]] = {}
        while (job := board.queue.peek()) is not None:
            home = self._home(job, now, reserving)
            if home is None:
                break
            self._join(home, board.queue.pop())
            groups.setdefault(home, []).append(job)
        yield from (Reserve(home, jobs, one_by_one=False) for home, jobs in groups.items())

    def _admit_hungry(self, now: float) -> Iterator[Reserve]:
        """The first of those that a stage was too full for; nobody overtakes it."""
        memory = self._board.memory
        home = self._home(memory.hungry[0], now, set()) if now >= memory.retry_at else None
        if home is not None:
            job = memory.hungry.pop(0)
            self._join(home, job)
            yield Reserve(home, [job], one_by_one=True)

    def _join(self, home: MicroBatch, job: Job) -> None:
        home.join(job)
        job.served = self._trips

    def _home(self, job: Job, now: float, closed: Set[MicroBatch]) -> MicroBatch | None:
        """The micro-batch that `job` joins, none of `closed`, new where there may be one more; None where it has to wait."""
        board = self._board
        most = board.limits.micro_batch_sequences
        sequences = board.running + len(board.queue) + len(board.memory.hungry)
        wanted = micro_batches_wanted(sequences, self._stages_at_once, most, self._allowed())
        # On an older revision sequences end where they began, and none begins: or it would never fall to zero.
        current = [batch for batch in board.micro_batches if not board.placement.outdated(batch.route)]
        if len(current) < wanted:
            route = board.placement.place(job.reserve_tokens)
            if route is None:
                board.no_route_since = board.no_route_since or now
                return None
            board.micro_batches.append(MicroBatch(route))
            return board.micro_batches[-1]
        with_room = [
            batch
            for batch in current
            if len(batch.jobs) < most
            and batch not in closed
            and batch.target is None
            and all(i.usable(now) for i in batch.route.instances)
        ]
        return min(with_room, key=lambda batch: (batch.route.lacks(job.reserve_tokens), len(batch.jobs)), default=None)

    # Moves.

    def _close_empty(self) -> None:
        board = self._board
        for batch in [batch for batch in board.micro_batches if not batch.jobs and not batch.decoding]:
            batch.route.close()
            board.micro_batches.remove(batch)

    def _move(self, now: float) -> None:
        """Away from instances that leave, at once; for balance, one micro-batch at a time."""
        placement = self._board.placement
        self._rebalance()
        for batch in self._board.micro_batches:
            if batch.target is not None and not batch.target.usable(now):
                batch.target = None
            leaving = placement.must_leave(batch.route)
            if leaving is not None and batch.target is None:
                self._board.stats.moves["leaving"] += 1
            batch.target = leaving or batch.target
            while batch.target is not None and batch.at_rest:
                self._carry_over(batch, batch.target)
                batch.target = placement.must_leave(batch.route)

    def _rebalance(self) -> None:
        board = self._board
        settling = self._settling
        if settling is not None and settling in board.micro_batches and (settling.target or not settling.caught_up):
            return
        self._settling = None
        uneven = board.placement.unbalanced()
        if uneven is None:
            return
        most, least = uneven
        movable = [b for b in board.micro_batches if most in b.route.instances and b.target is None and b.caught_up]
        if movable:
            self._settling = min(movable, key=lambda batch: batch.tokens)
            self._settling.target = least
            board.stats.moves["balance"] += 1

    def _carry_over(self, batch: MicroBatch, target: Instance) -> None:
        left = batch.move(target)
        for job in batch.jobs:
            job.sequence.replayed()
            self._board.releases[left].append(ReleaseRow(job.id, job.progress.attempt))
            self._board.stats.replays["moved"] += 1

    # Steps.

    def _choose_trial(self) -> None:
        """A suspect at its last chance goes on alone: nothing else of this gateway is in flight meanwhile."""
        trial = self._trial
        if trial is not None and (trial not in self._board.suspects or trial.micro_batch is None):
            self._trial = None
        if self._trial is None:
            ready = (job for job in self._board.suspects if job.strikes >= ON_TRIAL_AT and job.at_rest)
            self._trial = next((job for job in ready if not job.sequence.over), None)

    def _may_send(self, job: Job) -> bool:
        if self._trial is None:
            return job.strikes < ON_TRIAL_AT
        return job is self._trial and self._board.trips == job.progress.in_flight

    def _decode_steps(self) -> Iterator[Trip]:
        board = self._board
        most = board.limits.micro_batch_sequences
        wanted = micro_batches_wanted(board.running, self._stages_at_once, most, self._allowed())
        for batch in list(board.micro_batches):
            if batch.decoding or batch.target is not None:
                continue
            level(batch, board.micro_batches, len(board.micro_batches) > wanted, most)
            jobs = [job for job in batch.jobs if not job.strikes and job.decodes and self._may_send(job)]
            if jobs:
                batch.decoding = True
                depth = board.placement.num_stages - 1
                pieces = [(job, Piece(job.total_tokens - 1, 1, depth)) for job in jobs]
                yield self._trip(pieces, batch.route.instances, batch)

    def _prompt_steps(self, now: float) -> Iterator[Trip]:
        """At each first stage where no chunk is: one event, begun by whoever waits longest, filled up with others' chunks.

        Nothing to an instance that has just broken: suspects, who travel one by one, would each get another strike there.
        """
        by_route: dict[tuple[Instance, ...], list[Job]] = {}
        for batch in self._board.micro_batches:
            if batch.target is None and not batch.route.suspended(now) and batch.route.instances[0].prompts.idle:
                jobs = [job for job in batch.jobs if self._has_prompt(job)]
                by_route.setdefault(batch.route.instances, []).extend(jobs)
        candidates = [(min(job.served for job in jobs), route) for route, jobs in by_route.items() if jobs]
        for _, route in sorted(candidates, key=lambda candidate: candidate[0]):
            if not route[0].prompts.idle:
                continue
            jobs = sorted(by_route[route], key=lambda job: job.served)
            pieces = prompt_pieces(jobs, self._board.limits.chunk_tokens)
            if pieces:
                route[0].prompts.queue()
                yield self._trip(pieces, route, None)

    def _has_prompt(self, job: Job) -> bool:
        """At most as many chunks of it are on their way as there are stages."""
        if not job.reserved or job.must_restart or job.sequence.over or not self._may_send(job):
            return False
        return job.progress.in_flight < self._board.placement.num_stages and (job.strikes > 0 or not job.decodes)

    def _trip(self, pieces: list[tuple[Job, Piece]], route: tuple[Instance, ...], batch: MicroBatch | None) -> Trip:
        self._trips += 1
        self._board.trips += 1
        for job, piece in pieces:
            job.progress.send(piece)
            job.sequence.started()
            if batch is None:
                job.served = self._trips
            self._board.stats.prompt_tokens += max(0, min(piece.end, job.sequence.prompt_tokens) - piece.position)
        deadline = max(job.sequence.deadline for job, _ in pieces)
        return Trip(route, pieces, pieces[0][1].depth, batch, deadline)

    # Wake-ups.

    def _wake(self, now: float) -> Iterator[Wake]:
        """All stages at once the first time, then those that are still cold."""
        board = self._board
        stranded = any(board.placement.strands(batch.route) for batch in board.micro_batches)
        if now < self._wake_at or not (board.waiting or stranded):
            return
        first = board.no_route_since is None or now - board.no_route_since < WAKE_PAUSE_SECONDS
        yield from self.wake(everything=first)

    def wake(self, *, everything: bool) -> Iterator[Wake]:
        """Where any stage is cold, and no round is under way. everything: all stages, not only those that are known to be."""
        board = self._board
        cold = board.placement.cold()
        if cold and not self._waking:
            self._waking = True
            board.stats.wakes += 1
            yield Wake(list(range(board.placement.num_stages)) if everything else cold)
