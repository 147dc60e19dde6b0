"""Micro-batches: sequences that go round the stages together, on one route.

Sequences join and leave at step boundaries. Micro-batches on the same route exchange sequences for nothing, so they are kept
equally large; between routes a sequence would have to be computed anew.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from functions.gateway.scheduling.job import Job
from functions.gateway.scheduling.progress import Piece
from functions.gateway.stages.routes import Instance, Route


@dataclass(eq=False, slots=True)
class MicroBatch:
    route: Route
    jobs: list[Job] = field(default_factory=list)
    decoding: bool = False
    """Its decode step is on its way."""
    target: Instance | None = None
    """Where it will move as soon as it is at rest."""

    @property
    def at_rest(self) -> bool:
        return all(job.at_rest for job in self.jobs)

    @property
    def caught_up(self) -> bool:
        """Nobody in it is being computed anew: it may be moved again."""
        return all(job.decodes for job in self.jobs) or not self.jobs

    @property
    def tokens(self) -> int:
        """What a move has to compute anew, at most."""
        return sum(job.total_tokens for job in self.jobs)

    def take(self, job: Job) -> None:
        """`job` changes over from a micro-batch on the same route."""
        if job.micro_batch is not None:
            job.micro_batch.jobs.remove(job)
        self.join(job)

    def join(self, job: Job) -> None:
        self.jobs.append(job)
        job.micro_batch = self

    def move(self, instance: Instance) -> Instance:
        """Goes on with `instance`, which holds nothing yet; returns the one that it left. Only at rest."""
        for job in self.jobs:
            job.progress.missed(instance.stage, 0)
        self.target = None
        return self.route.replace(instance)


def level(own: MicroBatch, others: Iterable[MicroBatch], too_many: bool, most_sequences: int) -> None:
    """At a step boundary of `own`: gives sequences to smaller ones on its route, all of them where there are too many."""
    siblings = [
        other
        for other in others
        if other is not own and other.target is None and other.route.instances == own.route.instances and other.jobs
    ]
    if not siblings:
        return
    smallest = min(siblings, key=lambda sibling: len(sibling.jobs))
    if too_many and own.at_rest and len(own.jobs) + len(smallest.jobs) <= most_sequences:
        for job in list(own.jobs):
            smallest.take(job)
        return
    while len(own.jobs) > len(smallest.jobs) + 1:
        movable = next((job for job in own.jobs if job.decodes), None)
        if movable is None:
            return
        smallest.take(movable)
        smallest = min(siblings, key=lambda sibling: len(sibling.jobs))


def prompt_pieces(jobs: Sequence[Job], chunk_tokens: int) -> list[tuple[Job, Piece]]:
    """Chunks for one event, in the order of `jobs`, on one route: at most `chunk_tokens` together, all equally deep.

    A suspect travels alone. Empty where none of the jobs has something to send.
    """
    pieces: list[tuple[Job, Piece]] = []
    room = chunk_tokens
    for job in jobs:
        piece = job.progress.next_piece(job.total_tokens, room)
        if piece is None or (pieces and (piece.depth != pieces[0][1].depth or job.strikes)):
            continue
        pieces.append((job, piece))
        room -= piece.length
        if room <= 0 or job.strikes:
            break
    return pieces
