"""One event's way through the stages, and what the scheduler keeps of it until it is over."""

from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Final

import msgspec

from eventing.wire.events import Batch, Row, Sampling, Want
from functions.gateway.scheduling.micro_batch import MicroBatch
from functions.gateway.scheduling.progress import Piece
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.stages.instances import Instance
from functions.gateway.stages.trip import Trip

_GRAMMAR_BYTES: Final = 2**20
"""Of all sources in one event, each of which is said once. What finds no room, the last stage misses, and hears next time."""


@dataclass(frozen=True, slots=True)
class Step:
    trip: Trip
    pieces: Mapping[str, tuple[Sequence, Piece]]
    """By the id of their row."""
    micro_batch: MicroBatch | None
    """Whose decode step it is. None: prompt chunks."""

    @property
    def tokens(self) -> int:
        """That every stage computes, draft tokens among them."""
        return sum(piece.length + len(piece.draft_tokens) for _, piece in self.pieces.values())


def make_step(pieces: Items[tuple[Sequence, Piece]], instances: tuple[Instance, ...], micro_batch: MicroBatch | None) -> Step:
    """pieces: on the same route, all equally deep."""
    trip = Trip(
        instances=instances,
        batch=_first_batch(pieces, len(instances)),
        traces={sequence.id: trace for sequence, _ in pieces if (trace := sequence.prompt.trace) is not None},
        depth=pieces[0][1].depth,
        chunks=micro_batch is None,
        deadline=max(sequence.deadline for sequence, _ in pieces),
    )
    return Step(trip, {sequence.id: (sequence, piece) for sequence, piece in pieces}, micro_batch)


def _first_batch(pieces: Items[tuple[Sequence, Piece]], num_stages: int) -> Batch:
    """What the first stage is sent: token ids and no tensor."""
    token_ids = array("i")
    for sequence, piece in pieces:
        token_ids.extend(sequence.tokens[piece.position : piece.end])
        token_ids.extend(piece.draft_tokens)
    said: dict[str, int] = {}
    return Batch(tuple(_row(sequence, piece, num_stages, said) for sequence, piece in pieces), memoryview(token_ids))


def _row(sequence: Sequence, piece: Piece, num_stages: int, said: dict[str, int]) -> Row:
    """said: digests of grammars that the event has in full, and their bytes."""
    to_the_end = piece.depth == num_stages - 1
    draws = to_the_end and not piece.scores and piece.end == sequence.total_tokens
    scores = to_the_end and piece.scores
    return Row(
        id=sequence.id,
        attempt=sequence.progress.attempt,
        position=piece.position,
        length=piece.length + len(piece.draft_tokens),
        want=Want.TOKEN if draws else Want.LOGPROBS if scores else Want.NONE,
        draft_tokens=len(piece.draft_tokens),
        top_logprobs=sequence.prompt.top_logprobs if draws or scores else None,
        sampling=_sampling(sequence, said) if draws else None,
        reserve_tokens=sequence.reserve_tokens if piece.position == 0 else None,
    )


def _sampling(sequence: Sequence, said: dict[str, int]) -> Sampling:
    """With the grammar in full where the last stage may not know it and no row before says it."""
    sampling, grammar = sequence.prompt.sampling, sequence.prompt.sampling.grammar
    if grammar is None:
        return sampling
    unknown = not sequence.progress.introduced and grammar.digest not in said
    if unknown and sum(said.values()) + (size := len(grammar.source.encode())) <= _GRAMMAR_BYTES:
        said[grammar.digest] = size
        return sampling
    return msgspec.structs.replace(sampling, grammar=msgspec.structs.replace(grammar, source=""))
