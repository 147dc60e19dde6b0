"""Micro-batches, and the steps that carry them through the stages.

Sequences join and leave a micro-batch between its steps. Micro-batches on the same route exchange sequences at no cost, so they
are kept equally large. A sequence that moves to another route must be computed again.
"""

from array import array
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Final

import msgspec

from eventing.wire.events import Batch, Pooling, Row, Sampling, Want
from functions.gateway.scheduling.sequence import Chunk, Sequence
from functions.gateway.stages.client import Trip
from functions.gateway.stages.routes import Instance, Route

_MAX_VECTORS: Final = 48  # rows of one event that want one: vectors of 16,384 numbers then fit into a reply's table
_MAX_GRAMMAR_BYTES: Final = 2**20  # of grammar sources in one event; a grammar left out is a miss, and is sent with the next


@dataclass(eq=False, slots=True)
class MicroBatch:
    """Sequences that decode together, on one route."""

    route: Route  # used by no other micro-batch
    sequences: list[Sequence] = field(default_factory=list)
    decoding: bool = False  # its decode step is under way
    target: Instance | None = None  # instance that it migrates to once nothing of it is in flight

    @property
    def at_rest(self) -> bool:
        return all(sequence.at_rest for sequence in self.sequences)

    @property
    def caught_up(self) -> bool:
        """Whether the next chunk of every sequence is a decode step.

        False while a sequence is computed again after a migration.
        """
        return all(sequence.decodes for sequence in self.sequences)

    def holds_nothing(self, stage: int) -> bool:
        """Returns whether the micro-batch can move away from its instance of `stage` at no cost.

        This is so if the instance holds no tokens of its sequences, and none of them has chunks in flight, restores KV, gets KV
        from another instance or follows a leader. False for an empty micro-batch.
        """
        return bool(self.sequences) and not any(
            sequence.progress.held[stage]
            or not sequence.at_rest
            or sequence.restoring
            or sequence.handing_over is not None
            or sequence.leader is not None
            for sequence in self.sequences
        )

    def join(self, sequence: Sequence) -> None:
        self.sequences.append(sequence)
        sequence.route = self.route

    def drop(self, sequence: Sequence) -> None:
        """Removes a sequence and resets it for a new attempt. Its memory must have been released at all stages."""
        self.sequences.remove(sequence)
        sequence.leave()


def level(own: MicroBatch, others: Iterable[MicroBatch], too_many: bool, max_sequences: int) -> None:
    """Moves sequences from `own` to smaller micro-batches on the same route, so that they become equally large.

    Call it between two steps of `own`. If `too_many`, there are more micro-batches than wanted. Then all sequences move to the
    smallest one, if it has at most `max_sequences` afterwards.
    """
    siblings = [
        other
        for other in others
        if other is not own and other.target is None and other.route.instances == own.route.instances and other.sequences
    ]
    if not siblings:
        return
    smallest = min(siblings, key=lambda sibling: len(sibling.sequences))
    if too_many and own.at_rest and len(own.sequences) + len(smallest.sequences) <= max_sequences:
        for sequence in own.sequences:
            smallest.join(sequence)
        own.sequences.clear()
        return
    while len(own.sequences) > len(smallest.sequences) + 1:
        movable = next((sequence for sequence in own.sequences if sequence.decodes), None)
        if movable is None:
            return
        own.sequences.remove(movable)
        smallest.join(movable)
        smallest = min(siblings, key=lambda sibling: len(sibling.sequences))


def prompt_chunks(sequences: Items[Sequence], chunk_tokens: int) -> list[tuple[Sequence, Chunk]]:
    """Chooses the prompt chunks of one event. Returns an empty list if no sequence has a chunk to send.

    `sequences` share a route and are taken in their order. The chunks have at most `chunk_tokens` tokens in all, unless a
    prompt must be computed in one chunk. All chunks end at the same stage. A suspect gets an event of its own.
    """
    chunks: list[tuple[Sequence, Chunk]] = []
    remaining, vectors = chunk_tokens, _MAX_VECTORS
    for sequence in sequences:
        suspect = sequence.retry_budget.failures_here > 0
        chunk = sequence.next_chunk(remaining)
        if chunk is None or (chunks and (chunk.depth != chunks[0][1].depth or suspect)):
            continue
        chunks.append((sequence, chunk))
        remaining -= chunk.length
        vectors -= sequence.prompt.pooling is not None
        if remaining <= 0 or not vectors or suspect:
            break
    return chunks


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way: its trip, and the sequences and chunks that the trip carries."""

    trip: Trip
    chunks: Mapping[str, tuple[Sequence, Chunk]]  # by row id
    micro_batch: MicroBatch | None  # the one that decodes; None: the step carries prompt chunks
    decode_tokens: int  # that each stage computes in a decode step, draft tokens included; 0: prompt chunks


def make_step(chunks: Items[tuple[Sequence, Chunk]], instances: tuple[Instance, ...], micro_batch: MicroBatch | None) -> Step:
    """Makes a step of these chunks. All must end at the same stage, and their sequences must be on the route `instances`.

    `micro_batch` is the one that decodes. It is None for prompt chunks.
    """
    traces = {sequence.id: sequence.prompt.trace for sequence, _ in chunks if sequence.prompt.trace is not None}
    batch = first_batch(chunks, len(instances))
    trip = Trip(
        instances=instances,
        batch=batch,
        traces=traces,
        depth=chunks[0][1].depth,
        chunks=micro_batch is None,
        deadline=max([sequence.deadline for sequence, _ in chunks]),
    )
    decode_tokens = 0 if micro_batch is None else len(batch.token_ids)
    return Step(trip, {sequence.id: (sequence, chunk) for sequence, chunk in chunks}, micro_batch, decode_tokens)


def first_batch(chunks: Items[tuple[Sequence, Chunk]], num_stages: int) -> Batch:
    """Makes the Batch for the first stage. It has a row for each chunk, the token ids, and no tensor."""
    token_ids = array("i")
    rows: list[Row] = []
    grammars_sent: dict[str, int] = {}  # digest → bytes of its source
    for sequence, chunk in chunks:
        end = chunk.position + chunk.length
        token_ids.extend(sequence.tokens[chunk.position : end])
        token_ids.extend(chunk.draft_tokens)
        draws = scores = pools = False
        if chunk.depth == num_stages - 1:
            scores = chunk.scores
            pools = sequence.prompt.pooling is Pooling.MEAN
            if not scores and end == len(sequence.tokens):
                draws = sequence.prompt.pooling is None
                pools = not draws
        rows.append(
            Row(
                id=sequence.id,
                attempt=sequence.progress.attempt,
                position=chunk.position,
                length=chunk.length + len(chunk.draft_tokens),
                want=Want.TOKEN if draws else Want.LOGPROBS if scores else Want.VECTOR if pools else Want.NONE,
                draft_tokens=len(chunk.draft_tokens),
                following=len(sequence.tokens) - end,
                top_logprobs=sequence.prompt.top_logprobs if draws or scores else None,
                pooling=sequence.prompt.pooling if pools else None,
                sampling=_sampling(sequence, grammars_sent) if draws else None,
                reserve_tokens=sequence.reserve_tokens if chunk.position == 0 else None,
                adapter=sequence.prompt.adapter,
            )
        )
    return Batch(tuple(rows), memoryview(token_ids))


def _sampling(sequence: Sequence, grammars_sent: dict[str, int]) -> Sampling:
    """Returns the sampling settings for a sequence's row.

    They include the grammar's source only if the last stage may not know it and the event has space for it. `grammars_sent`
    maps the digests of sources in earlier rows of the event to their sizes in bytes. It is updated.
    """
    sampling, grammar = sequence.prompt.sampling, sequence.prompt.sampling.grammar
    if grammar is None:
        return sampling
    if not sequence.progress.grammar_known and grammar.digest not in grammars_sent:
        size = len(grammar.source.encode())
        if sum(grammars_sent.values()) + size <= _MAX_GRAMMAR_BYTES:
            grammars_sent[grammar.digest] = size
            return sampling
    return msgspec.structs.replace(sampling, grammar=msgspec.structs.replace(grammar, source=""))
