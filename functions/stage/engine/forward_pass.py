"""One pass of a layer group over the rows of several events: admit, run, split, answer."""

import math
from array import array
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from eventing.wire.events import Batch, Result, Row, Status, Tensor, Want
from functions.grammars.matcher import Allowed
from functions.grammars.unusable import UnusableGrammar
from functions.stage.engine.constraints import Constrained, Constraints, Found, grammar_of
from functions.stage.engine.drawing import Drawing, draw
from functions.stage.engine.row_checks import invalid_rows
from functions.stage.engine.sampler import GREEDY, TopLogprobs, log_probabilities
from functions.stage.engine.sequences import Refusal, SequenceState, SequenceTable
from functions.stage.engine.wire_tensors import hidden_array, token_array, wire_tensor
from functions.stage.models.floats import DTYPES, Array, Float32, all_finite, finite_rows
from functions.stage.models.layer_group import LayerGroup, Segment

_TOKENS_AT_ONCE: Final = 1024
"""In the layers: what these take grows with the tokens of a pass, and more of them gain nothing."""
_LOGITS_AT_ONCE: Final = 256
"""Rows of logits in memory at once: 256 × 128k × 4 bytes are 128 MiB."""


@dataclass(slots=True)
class _Computed:
    """A row that goes through the layers."""

    index: int
    row: Row
    sequence: SequenceState
    span: slice
    """Its tokens in its event."""
    begin: int = 0
    """Where its tokens begin in the tensor of the whole pass."""
    allowed: Sequence[Allowed] | None = None
    """What it may draw, where that is not everything."""
    result: Result | None = None
    refusal: Refusal | None = None
    """Where its logits are no numbers to answer with, or its grammar cannot be used."""

    @property
    def end(self) -> int:
        return self.begin + self.row.length

    @property
    def places(self) -> range:
        """Of the pass's tokens, those behind which a token may be drawn."""
        return range(self.end - 1 - self.row.draft_tokens, self.end)


@dataclass(slots=True)
class Part:
    """One event's share of a pass: its batch, and the rows of it that are stale already."""

    batch: Batch
    source: str
    stale: AbstractSet[int]
    hidden: Array | None = field(init=False, default=None)
    """[tokens, hidden_size], None into the first stage."""
    answers: list[Row] = field(init=False)
    computed: list[_Computed] = field(init=False)

    def __post_init__(self) -> None:
        self.answers = list(self.batch.rows)
        self.computed = []

    def inputs(self) -> Array:
        """Of the rows that are computed, in their order."""
        inputs = token_array(self.batch.token_ids) if self.hidden is None else self.hidden
        if len(self.computed) == len(self.batch.rows):
            return inputs
        return np.concatenate([inputs[row.span] for row in self.computed])

    def refuse(self, index: int, refusal: Refusal) -> None:
        self.answers[index] = refused(self.batch.rows[index], refusal)


def refused(row: Row, refusal: Refusal) -> Row:
    """The answer to a row that was not computed: without its tokens, and without what only a computed row needs."""
    return Row(
        id=row.id,
        attempt=row.attempt,
        position=row.position,
        length=0,
        status=refusal.status,
        held=refusal.held,
        reason=refusal.reason,
    )


class ForwardPass:
    """Runs parts whose sequences are all different. Only the engine's thread comes here."""

    def __init__(self, group: LayerGroup, sequences: SequenceTable, constraints: Constraints, wire_dtype: str) -> None:
        """wire_dtype: in which hidden states come and go."""
        self._group = group
        self._wire_dtype = wire_dtype
        self._sequences = sequences
        self._constraints = constraints
        self._is_last = group.last_layer == group.num_layers

    def run(self, parts: Sequence[Part]) -> list[Batch]:
        """One reply for each part. Where this raises, every sequence's KV is cut to what its row found."""
        for part in parts:
            self._admit(part)
        computed = [row for part in parts for row in part.computed]
        constrained = [row for row in computed if self._is_last and grammar_of(row.row) is not None]
        try:
            found = self._constraints.begin([_constrained(row) for row in constrained]) if constrained else None
            hidden = self._forward(parts)
            if found is not None:
                self._constrain(constrained, found)
            if hidden is not None:
                self._refuse_not_finite(parts, hidden)
            if self._is_last:
                return self._results(parts, hidden)
        except Exception:
            for row in computed:
                self._group.kv.truncate(row.sequence.handle, row.row.position)
            raise
        return [self._relay(part, hidden) for part in parts]

    def _admit(self, part: Part) -> None:
        batch = part.batch
        if batch.hidden is not None:
            part.hidden = hidden_array(batch.hidden, self._group.hidden_dtype)
        invalid = invalid_rows(batch, part.hidden, self._group)
        offsets = batch.offsets()
        ids: set[str] = set()
        for index, row in enumerate(batch.rows):
            if row.status is not Status.OK:
                continue
            try:
                if row.id in ids:
                    raise Refusal(Status.INVALID, reason=f"the id {row.id!r} is in the event twice")
                ids.add(row.id)
                if index in invalid:
                    raise Refusal(Status.INVALID, reason=invalid[index])
                if index in part.stale:
                    raise Refusal(Status.STALE)
                sequence = self._sequences.admit(row, part.source)
                if self._is_last:
                    self._constraints.admit(row, sequence)
            except Refusal as refusal:
                part.refuse(index, refusal)
                continue
            span = slice(offsets[index], offsets[index + 1])
            if self._is_last:
                _put(sequence.token_ids, row.position, batch.token_ids[span])
            part.computed.append(_Computed(index, row, sequence, span))

    def _forward(self, parts: Sequence[Part]) -> Array | None:
        parts = [part for part in parts if part.computed]
        if not parts:
            return None
        segments: list[Segment] = []
        begin = 0
        for row in (row for part in parts for row in part.computed):
            row.begin = begin
            begin = row.end
            segments.append(Segment(row.sequence.handle, row.row.position, row.row.length))
        inputs = [part.inputs() for part in parts]
        return self._through_the_layers(np.concatenate(inputs) if len(inputs) > 1 else inputs[0], segments)

    def _through_the_layers(self, inputs: Array, segments: Sequence[Segment]) -> Array:
        """One pass of the group, or several one after the other where a long text is scored in a single event."""
        if len(inputs) <= _TOKENS_AT_ONCE:
            return self._group.forward(inputs, segments)
        hidden = np.empty((len(inputs), self._group.hidden_size), DTYPES[self._group.hidden_dtype])
        for first in range(0, len(inputs), _TOKENS_AT_ONCE):
            rows = slice(first, min(first + _TOKENS_AT_ONCE, len(inputs)))
            hidden[rows] = self._group.forward(inputs[rows], _segments_of(segments, rows))
        return hidden

    def _refuse_not_finite(self, parts: Sequence[Part], hidden: Array) -> None:
        if all_finite(hidden, self._group.hidden_dtype):
            return
        finite = finite_rows(hidden, self._group.hidden_dtype)
        for part in parts:
            for row in list(part.computed):
                if not finite[row.begin : row.end].all():
                    self._group.kv.truncate(row.sequence.handle, row.row.position)
                    reason = f"hidden states that came out, behind layer {self._group.last_layer - 1}, are not finite"
                    part.refuse(row.index, Refusal(Status.INVALID, reason=reason))
                    part.computed.remove(row)

    def _constrain(self, rows: Sequence[_Computed], found: "Future[list[Found]]") -> None:
        """Waits for what was being found beside the layers."""
        for row, allowed in zip(rows, found.result(), strict=True):
            if isinstance(allowed, UnusableGrammar):
                self._refuse(row, f"the grammar cannot be followed here: {allowed}")
            else:
                row.allowed = allowed

    def _results(self, parts: Sequence[Part], hidden: Array | None) -> list[Batch]:
        if hidden is not None:
            wanting = [row for part in parts for row in part.computed if row.row.want is Want.TOKEN and row.refusal is None]
            self._draw(wanting, hidden)
        for part in parts:
            for row in part.computed:
                if hidden is not None and row.row.want is Want.LOGPROBS:
                    self._settle(row, self._scores(row, token_array(part.batch.token_ids[row.span]), hidden))
                if row.refusal is not None:
                    part.refuse(row.index, row.refusal)
                else:
                    part.answers[row.index] = _answer(row)
        return [Batch(tuple(part.answers), memoryview(array("i"))) for part in parts]

    def _relay(self, part: Part, hidden: Array | None) -> Batch:
        """What the next stage takes. Where every row is ok, rows and token ids are those that came in."""
        rows = part.computed
        if hidden is None or not rows:
            return Batch(tuple(part.answers), memoryview(array("i")))
        if len(rows) == len(part.batch.rows):
            return Batch(part.batch.rows, part.batch.token_ids, self._tensor(hidden[rows[0].begin : rows[-1].end]))
        token_ids = array("i")
        for row in rows:
            token_ids.extend(part.batch.token_ids[row.span])
        kept = np.concatenate([hidden[row.begin : row.end] for row in rows])
        return Batch(tuple(part.answers), memoryview(token_ids), self._tensor(kept))

    def _tensor(self, hidden: Array) -> Tensor:
        return wire_tensor(hidden, self._group.hidden_dtype, self._wire_dtype)

    def _draw(self, wanting: Sequence[_Computed], hidden: Array) -> None:
        for some in _few_enough(wanting):
            logits = self._group.logits(hidden[[place for row in some for place in row.places]])
            ends = np.cumsum([len(row.places) for row in some])
            drawings = [_drawing(row, own) for row, own in zip(some, np.split(logits, ends[:-1]), strict=True)]
            draw(drawings)
            for row, drawing in zip(some, drawings, strict=True):
                self._settle(row, _drawn(row, drawing) if drawing.tokens else None)

    def _settle(self, row: _Computed, result: Result | None) -> None:
        """None: the hidden states are finite and the logits are not, so whatever was answered would be made up."""
        row.result = result
        if result is None:
            self._refuse(row, "the logits of the row are not finite")

    def _refuse(self, row: _Computed, reason: str) -> None:
        self._group.kv.truncate(row.sequence.handle, row.row.position)
        row.refusal = Refusal(Status.INVALID, reason=reason)

    def _scores(self, row: _Computed, token_ids: Array, hidden: Array) -> Result | None:
        """Each token's log-probability under the logits of the token before it, so none for the row's first; None where one is
        no number. hidden: of the whole pass."""
        found: list[tuple[float, TopLogprobs]] = []
        predicting, predicted = hidden[row.begin : row.end - 1], token_ids[1:]
        for first in range(0, len(predicted), _LOGITS_AT_ONCE):
            some = slice(first, first + _LOGITS_AT_ONCE)
            found += log_probabilities(self._group.logits(predicting[some]), predicted[some], row.row.top_logprobs or 0)
        return _with_logprobs(row, found) if all(math.isfinite(logprob) for logprob, _ in found) else None


def _drawn(row: _Computed, drawing: Drawing) -> Result:
    tokens = tuple(drawing.tokens)
    if row.row.top_logprobs is None:
        return Result(tokens)
    return _with_logprobs(row, log_probabilities(drawing.logits[: len(tokens)], tokens, row.row.top_logprobs), tokens)


def _with_logprobs(row: _Computed, found: Sequence[tuple[float, TopLogprobs]], tokens: tuple[int, ...] | None = None) -> Result:
    top = tuple(top for _, top in found) if row.row.top_logprobs else None
    return Result(tokens, tuple(logprob for logprob, _ in found), top)


def _put(token_ids: "array[int]", position: int, new: memoryview) -> None:
    """Where tokens before it were not computed here, and nobody said which they are, no draw depends on them: zeros do."""
    del token_ids[position:]
    token_ids.extend([0] * (position - len(token_ids)))
    token_ids.extend(new)


def _drawing(row: _Computed, logits: Float32) -> Drawing:
    """logits: behind each of its places."""
    end = row.row.position + row.row.length
    return Drawing(row.row.sampling or GREEDY, row.sequence.token_ids, end, row.row.draft_tokens, logits, row.allowed)


def _constrained(row: _Computed) -> Constrained:
    grammar, sampling = grammar_of(row.row), row.row.sampling
    assert grammar is not None
    assert sampling is not None
    known = row.row.position + row.row.length - row.row.draft_tokens
    token_ids = row.sequence.token_ids
    return Constrained(grammar, row.sequence, token_ids[sampling.prompt_tokens : known], token_ids[known:])


def _few_enough(rows: Sequence[_Computed]) -> Iterator[list[_Computed]]:
    """So many at once that their logits have room, at least one."""
    some: list[_Computed] = []
    for row in rows:
        if some and sum(len(each.places) for each in some) + len(row.places) > _LOGITS_AT_ONCE:
            yield some
            some = []
        some.append(row)
    if some:
        yield some


def _segments_of(segments: Sequence[Segment], rows: slice) -> list[Segment]:
    """What some rows of a pass are of its segments."""
    parts: list[Segment] = []
    begin = 0
    for segment in segments:
        first, last = max(begin, rows.start) - begin, min(begin + segment.length, rows.stop) - begin
        if first < last:
            parts.append(Segment(segment.handle, segment.position + first, last - first))
        begin += segment.length
    return parts


def _answer(row: _Computed) -> Row:
    """Of the last stage: the result in place of the tokens, and nothing that only a stage needs."""
    return Row(row.row.id, row.row.attempt, row.row.position, length=0, want=row.row.want, result=row.result)
