"""Runs one forward pass of a layer group over the rows of several events: admits rows, runs the layers, answers events."""

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np

from eventing.wire.events import Batch, Grammar, Result, Row, Sampling, Status, Want
from functions.grammars.matcher import Allowed
from functions.grammars.sources import UnusableGrammar
from functions.stage.engine.constraints import ConstrainedRow, Constraints
from functions.stage.engine.event_queue import ForwardEvent
from functions.stage.engine.row_checks import invalid_rows
from functions.stage.engine.sampler import GREEDY, Drawing, TopLogprobs, draw, log_probabilities
from functions.stage.engine.sequences import Refusal, SequenceState, SequenceTable
from functions.stage.engine.wire_tensors import hidden_array, wire_tensor
from functions.stage.models.floats import Array, all_finite, finite_rows
from functions.stage.models.layer_group import LayerGroup, Segment, segments_within
from functions.stage.models.vector_head import VectorHead

_TOKENS_AT_ONCE: Final = 1024  # most tokens in the layers at a time: memory grows with it, and more are no faster
_LOGITS_AT_ONCE: Final = 256  # rows of logits in memory: 256 × 128k × 4 bytes are 128 MiB

_NO_TOKENS: Final = memoryview(array("i"))


@dataclass(slots=True)
class _PassRow:
    """An admitted row of an event. The pass runs the layers over it."""

    index: int  # of the row in its event
    row: Row
    sequence: SequenceState
    span: slice  # indexes of its tokens in the event
    adapter: int = 0  # its number in the layer group; 0: none
    sampling: Sampling = GREEDY
    grammar: Grammar | None = None  # that the tokens drawn must follow
    begin: int = 0  # its tokens in the pass are [begin, end)
    end: int = 0
    masks: Sequence[Allowed] | None = None  # tokens that its grammar allows; None: all
    result: Result | None = None
    refusal: Refusal | None = None  # its logits are not finite, or its grammar cannot be followed


@dataclass(slots=True)
class _EventPart:
    """One event in a pass: the admitted rows, and the replies to all rows."""

    batch: Batch
    inputs: Array  # token ids or hidden states of the admitted rows
    answers: list[Row]  # one for each row of the event; until it is answered, the row that came in
    rows: list[_PassRow] = field(default_factory=list)

    def refuse(self, index: int, refusal: Refusal) -> None:
        row = self.batch.rows[index]
        self.answers[index] = Row(
            id=row.id,
            attempt=row.attempt,
            position=row.position,
            length=0,
            status=refusal.status,
            held=refusal.held,
            reason=refusal.reason,
        )


class ForwardPass:
    """Runs forward passes over events whose sequences are all different.

    Only the thread that holds the engine's lock may call it.
    """

    def __init__(
        self,
        group: LayerGroup,
        sequences: SequenceTable,
        constraints: Constraints,
        wire_dtype: str,
        vector_head: VectorHead,
        adapter_number: Callable[[bytes], int],
    ) -> None:
        """Prepares to run passes of `group` over sequences in the table `sequences`.

        wire_dtype: dtype of hidden states in events, either I8 or the dtype of the group.
        adapter_number: returns the number of an adapter in the group. Raises Refusal if the adapter is not loaded.
        """
        self._group = group
        self._vector_head = vector_head
        self._wire_dtype = wire_dtype
        self._sequences = sequences
        self._adapter_number = adapter_number
        self._constraints = constraints
        self._is_last = group.last_layer == group.num_layers

    def run(self, events: Sequence[ForwardEvent]) -> list[Batch]:
        """Runs one pass and returns the reply to each event.

        On an error, first truncates the KV of each sequence to the position of its row, so that the events can run again.
        """
        parts = [self._admit(event) for event in events]
        rows = [row for part in parts for row in part.rows]
        if not rows:
            return [Batch(tuple(part.answers), _NO_TOKENS) for part in parts]
        try:
            constrained = [row for row in rows if row.grammar is not None]
            masks = self._constraints.begin([_constrained_row(row) for row in constrained]) if constrained else None
            hidden = self._run_layers(parts, rows)
            if masks is not None:
                for row, own in zip(constrained, masks.result(), strict=True):
                    if isinstance(own, UnusableGrammar):
                        self._refuse(row, f"this stage cannot follow the grammar: {own}")
                    else:
                        row.masks = own
            if not all_finite(hidden, self._group.hidden_dtype):
                self._refuse_not_finite(parts, hidden)
            if self._is_last:
                return self._results(parts, hidden)
            return [self._relay(part, hidden) for part in parts]
        except Exception:
            for row in rows:
                self._group.kv.truncate(row.sequence.handle, row.row.position)
            raise

    def _admit(self, event: ForwardEvent) -> _EventPart:
        batch = event.batch
        hidden = None if batch.hidden is None else hidden_array(batch.hidden, self._group.hidden_dtype)
        invalid = invalid_rows(batch, hidden, self._group, self._vector_head.embedder)
        inputs = np.array(batch.token_ids, np.int64) if hidden is None else hidden
        part = _EventPart(batch, inputs, list(batch.rows))
        ids: set[str] = set()
        begin = 0
        for index, row in enumerate(batch.rows):
            span = slice(begin, begin + row.length)
            begin = span.stop
            if row.status is not Status.OK:
                continue
            try:
                if row.id in ids:
                    raise Refusal(Status.INVALID, reason=f"the id {row.id!r} is in the event twice")
                ids.add(row.id)
                if index in invalid:
                    raise Refusal(Status.INVALID, reason=invalid[index])
                if index in event.stale:
                    raise Refusal(Status.STALE)
                adapter = self._adapter_number(row.adapter) if row.adapter else 0
                sequence = self._sequences.admit(row, event.source, event.lineage)
                pass_row = _PassRow(index, row, sequence, span, adapter, row.sampling or GREEDY)
                if self._is_last:
                    if row.want is Want.TOKEN and pass_row.sampling.grammar is not None:
                        pass_row.grammar = pass_row.sampling.grammar
                        self._constraints.admit(row, pass_row.grammar, sequence)
                    # Tokens before the row that this stage was never told stay 0: no draw of the sequence depends on them.
                    token_ids = sequence.token_ids
                    del token_ids[row.position :]
                    if len(token_ids) < row.position:
                        token_ids.extend([0] * (row.position - len(token_ids)))
                    token_ids.extend(batch.token_ids[span])
            except Refusal as refusal:
                part.refuse(index, refusal)
            else:
                part.rows.append(pass_row)
        if len(part.rows) < len(batch.rows):
            part.inputs = np.concatenate([inputs[row.span] for row in part.rows]) if part.rows else inputs[:0]
        return part

    def _run_layers(self, parts: Sequence[_EventPart], rows: Sequence[_PassRow]) -> Array:
        """Runs the layers over all rows and returns their hidden states [tokens, size]. Sets `begin` and `end` of each row."""
        segments: list[Segment] = []
        begin = 0
        for part in parts:
            for row in part.rows:
                row.begin, row.end = begin, begin + row.row.length
                begin = row.end
                own, sequence = row.row, row.sequence
                token_ids = np.array(part.batch.token_ids[row.span], np.int64) if self._group.takes_token_ids else None
                segments.append(
                    Segment(
                        sequence.handle, own.position, own.length, sequence.is_long, own.draft_tokens, row.adapter, token_ids
                    )
                )
        inputs = parts[0].inputs if len(parts) == 1 else np.concatenate([part.inputs for part in parts if part.rows])
        if len(inputs) <= _TOKENS_AT_ONCE:
            return self._group.forward(inputs, segments)
        # A long text that is scored in a single event: run its tokens in several passes, in their order.
        embedder = self._vector_head.embedder
        bounds = _whole_rows(rows) if embedder and embedder.bidirectional else range(0, len(inputs), _TOKENS_AT_ONCE)
        return np.concatenate(
            [
                self._group.forward(inputs[first:end], segments_within(segments, first, end))
                for first, end in pairwise([*bounds, len(inputs)])
            ]
        )

    def _refuse_not_finite(self, parts: Sequence[_EventPart], hidden: Array) -> None:
        finite = finite_rows(hidden, self._group.hidden_dtype)
        for part in parts:
            for row in list(part.rows):
                if not finite[row.begin : row.end].all():
                    self._group.kv.truncate(row.sequence.handle, row.row.position)
                    reason = f"hidden states that came out of layer {self._group.last_layer - 1} are not finite"
                    part.refuse(row.index, Refusal(Status.INVALID, reason=reason))
                    part.rows.remove(row)

    def _results(self, parts: Sequence[_EventPart], hidden: Array) -> list[Batch]:
        """Returns the last stage's reply to each event: rows with drawn tokens, log-probabilities or vectors."""
        drawing = [row for part in parts for row in part.rows if row.row.want is Want.TOKEN and row.refusal is None]
        for rows in _split_by_logits(drawing):
            self._draw(rows, hidden)
        replies: list[Batch] = []
        for part in parts:
            for row in part.rows:
                asked = row.row
                if asked.want is Want.LOGPROBS:
                    self._score(row, part.batch.token_ids[row.span], hidden)
                elif asked.want is Want.VECTOR and asked.pooling is not None:
                    own = hidden[row.begin : row.end]
                    vector = self._vector_head(own, self._group.hidden_dtype, asked.pooling)
                    row.result = Result(vector=vector.astype("<f4").tobytes())
                if row.refusal is not None:
                    part.refuse(row.index, row.refusal)
                else:
                    part.answers[row.index] = Row(
                        asked.id, asked.attempt, asked.position, length=0, want=asked.want, result=row.result
                    )
            replies.append(Batch(tuple(part.answers), _NO_TOKENS))
        return replies

    def _relay(self, part: _EventPart, hidden: Array) -> Batch:
        """Returns the reply to one event at a stage that is not the last. The reply is the input of the next stage.

        It includes refused rows. If no row is refused, it has the rows and token ids of the event. hidden: hidden states of all
        rows of the pass.
        """
        batch, rows, dtype = part.batch, part.rows, self._group.hidden_dtype
        if not rows:
            return Batch(tuple(part.answers), _NO_TOKENS)
        if len(rows) == len(batch.rows):
            return Batch(
                batch.rows, batch.token_ids, wire_tensor(hidden[rows[0].begin : rows[-1].end], dtype, self._wire_dtype)
            )
        token_ids = array("i")
        for row in rows:
            token_ids.extend(batch.token_ids[row.span])
        kept = np.concatenate([hidden[row.begin : row.end] for row in rows])
        return Batch(tuple(part.answers), memoryview(token_ids), wire_tensor(kept, dtype, self._wire_dtype))

    def _draw(self, rows: Sequence[_PassRow], hidden: Array) -> None:
        """Draws tokens and sets the result of each row: one token, and one more for each accepted draft token.

        Refuses rows whose logits are not finite. hidden: hidden states of all rows of the pass.
        """
        places: list[int] = []
        for row in rows:
            places.extend(range(row.end - 1 - row.row.draft_tokens, row.end))
        logits = self._group.logits(hidden[places])
        drawings: list[Drawing] = []
        begin = 0
        for row in rows:
            asked = row.row
            own = logits[begin : begin + 1 + asked.draft_tokens]
            begin += len(own)
            position = asked.position + asked.length - asked.draft_tokens
            if self._group.short_context is not None and not row.sequence.is_long:
                own = own[: self._group.short_context - position + 1]  # beyond it, draft tokens have other rotations
            token_ids = row.sequence.token_ids
            drawings.append(Drawing(own, row.sampling, position, token_ids[:position], token_ids[position:], row.masks))
        draw(drawings, self._group.native_threads)
        for row, drawing in zip(rows, drawings, strict=True):
            tokens, top = tuple(drawing.drawn), row.row.top_logprobs
            if not tokens:
                self._refuse(row, "the logits of the row are not finite")
            elif top is None:
                row.result = Result(tokens)
            else:
                row.result = _with_logprobs(row, log_probabilities(drawing.logits[: len(tokens)], tokens, top), tokens)

    def _score(self, row: _PassRow, token_ids: memoryview, hidden: Array) -> None:
        """Sets the result of a row: the log-probability of each token after the first, given the tokens before it.

        Refuses the row if a log-probability is not finite. token_ids: ids of the row's tokens. hidden: hidden states of all
        rows of the pass.
        """
        found: list[tuple[float, TopLogprobs]] = []
        predicting, predicted = hidden[row.begin : row.end - 1], token_ids[1:]
        for first in range(0, len(predicted), _LOGITS_AT_ONCE):
            some = slice(first, first + _LOGITS_AT_ONCE)
            found += log_probabilities(self._group.logits(predicting[some]), predicted[some], row.row.top_logprobs or 0)
        if all(math.isfinite(logprob) for logprob, _ in found):
            row.result = _with_logprobs(row, found)
        else:
            self._refuse(row, "the logits of the row are not finite")

    def _refuse(self, row: _PassRow, reason: str) -> None:
        self._group.kv.truncate(row.sequence.handle, row.row.position)
        row.refusal = Refusal(Status.INVALID, reason=reason)


def _with_logprobs(row: _PassRow, found: Sequence[tuple[float, TopLogprobs]], tokens: tuple[int, ...] | None = None) -> Result:
    top = tuple(top for _, top in found) if row.row.top_logprobs else None
    return Result(tokens, tuple(logprob for logprob, _ in found), top)


def _constrained_row(row: _PassRow) -> ConstrainedRow:
    assert row.grammar is not None
    certain = row.row.position + row.row.length - row.row.draft_tokens
    token_ids = row.sequence.token_ids
    return ConstrainedRow(row.grammar, row.sequence, token_ids[row.sampling.prompt_tokens : certain], token_ids[certain:])


def _whole_rows(rows: Sequence[_PassRow]) -> list[int]:
    """Splits the tokens of a pass into parts that never cut a row. Returns the index of each part's first token.

    A part has at most _TOKENS_AT_ONCE tokens, unless it is a single longer row.
    """
    firsts = [0]
    for row in rows:
        if row.end - firsts[-1] > _TOKENS_AT_ONCE and row.begin > firsts[-1]:
            firsts.append(row.begin)
    return firsts


def _split_by_logits(rows: Sequence[_PassRow]) -> list[list[_PassRow]]:
    """Splits rows into lists that need at most _LOGITS_AT_ONCE rows of logits each.

    A list that consists of a single row may need more.
    """
    lists: list[list[_PassRow]] = []
    logits = _LOGITS_AT_ONCE
    for row in rows:
        logits += 1 + row.row.draft_tokens
        if logits > _LOGITS_AT_ONCE:
            lists.append([])
            logits = 1 + row.row.draft_tokens
        lists[-1].append(row)
    return lists
