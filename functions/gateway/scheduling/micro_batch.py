"""Micro-batches: sequences that go round the stages together, on one route.

Sequences join and leave at step boundaries. Micro-batches on the same route exchange sequences for nothing, so they are kept
equally large; between routes a sequence would have to be computed anew.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from functions.gateway.scheduling.progress import Piece
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.stages.instances import Instance
from functions.gateway.stages.routes import Route


@dataclass(eq=False, slots=True)
class MicroBatch:
    route: Route
    """Its own: no other micro-batch has the same object."""
    sequences: list[Sequence] = field(default_factory=list)
    decoding: bool = False
    """Its decode step is on its way."""
    target: Instance | None = None
    """Where it will move as soon as it is at rest."""

    @property
    def at_rest(self) -> bool:
        return all(sequence.at_rest for sequence in self.sequences)

    @property
    def caught_up(self) -> bool:
        """Nobody in it is being computed anew: it may be moved again."""
        return all(sequence.decodes for sequence in self.sequences) or not self.sequences

    @property
    def tokens(self) -> int:
        """What a move has to compute anew, at most."""
        return sum(sequence.total_tokens for sequence in self.sequences)

    def join(self, sequence: Sequence) -> None:
        self.sequences.append(sequence)
        sequence.route = self.route

    def part_with(self, sequence: Sequence) -> None:
        """`sequence` holds nothing anywhere any more."""
        self.sequences.remove(sequence)
        sequence.leave()

    def take(self, sequence: Sequence, other: "MicroBatch") -> None:
        """`sequence` changes over from `other`, which is on the same route."""
        other.sequences.remove(sequence)
        self.join(sequence)

    def move(self, instance: Instance) -> Instance:
        """Goes on with `instance`, which holds nothing yet; returns the one that it left. Only at rest."""
        for sequence in self.sequences:
            sequence.progress.missed(instance.stage, 0)
        self.target = None
        return self.route.replace(instance)


def level(own: MicroBatch, others: Iterable[MicroBatch], too_many: bool, most_sequences: int) -> None:
    """At a step boundary of `own`: gives sequences to smaller ones on its route, all of them where there are too many."""
    siblings = [
        other
        for other in others
        if other is not own and other.target is None and other.route.instances == own.route.instances and other.sequences
    ]
    if not siblings:
        return
    smallest = min(siblings, key=lambda sibling: len(sibling.sequences))
    if too_many and own.at_rest and len(own.sequences) + len(smallest.sequences) <= most_sequences:
        for sequence in list(own.sequences):
            smallest.take(sequence, own)
        return
    while len(own.sequences) > len(smallest.sequences) + 1:
        movable = next((sequence for sequence in own.sequences if sequence.decodes), None)
        if movable is None:
            return
        smallest.take(movable, own)
        smallest = min(siblings, key=lambda sibling: len(sibling.sequences))


def prompt_pieces(sequences: Items[Sequence], chunk_tokens: int) -> list[tuple[Sequence, Piece]]:
    """Chunks for one event, in the order of `sequences`, on one route: at most `chunk_tokens` together, all equally deep.

    A suspect travels alone. Empty where none of them has something to send.
    """
    pieces: list[tuple[Sequence, Piece]] = []
    room = chunk_tokens
    for sequence in sequences:
        suspect = sequence.strikes.count > 0
        piece = sequence.next_piece(room)
        if piece is None or (pieces and (piece.depth != pieces[0][1].depth or suspect)):
            continue
        pieces.append((sequence, piece))
        room -= piece.length
        if room <= 0 or suspect:
            break
    return pieces
