"""What makes an event unreadable as a whole, and what makes one of its rows invalid."""

from eventing.problems import EventTooLarge, MalformedEvent
from eventing.wire.events import MAX_BATCH_TOKENS, MAX_ROWS, Batch, Row, Status
from functions.stage.models.floats import Array, all_finite, finite_rows
from functions.stage.models.layer_group import LayerGroup


def check_event(batch: Batch, group: LayerGroup, wire_dtype: str) -> None:
    """Raises MalformedEvent or EventTooLarge where no row can be told from another, or the tensor is not this stage's."""
    tokens = len(batch.token_ids)
    if not 1 <= len(batch.rows) <= MAX_ROWS:
        raise MalformedEvent(f"the batch has {len(batch.rows)} rows, it must have 1 to {MAX_ROWS}")
    if tokens > MAX_BATCH_TOKENS:
        raise EventTooLarge(f"the batch has {tokens} tokens, the most is {MAX_BATCH_TOKENS}")
    lengths = [row.length for row in batch.rows]
    if min(lengths) < 0 or sum(lengths) != tokens:
        raise MalformedEvent(f"the rows' lengths add up to {sum(lengths)}, there are {tokens} token ids")
    _check_hidden(batch, group, wire_dtype, tokens)


def _check_hidden(batch: Batch, group: LayerGroup, wire_dtype: str, tokens: int) -> None:
    hidden = batch.hidden
    if group.first_layer == 0:
        if hidden is not None:
            raise MalformedEvent("the batch has a tensor, but the first stage takes token ids alone")
        return
    if hidden is None:
        if tokens:
            raise MalformedEvent(f"the batch has no tensor, but layer {group.first_layer} takes hidden states")
        return
    wanted = (wire_dtype, (tokens, group.hidden_size))
    if (hidden.dtype, hidden.shape) != wanted:
        seen = f"{hidden.dtype} {list(hidden.shape)}"
        raise MalformedEvent(f"the tensor is {seen}, this stage takes {wanted[0]} {list(wanted[1])}")


def invalid_rows(batch: Batch, hidden: Array | None, group: LayerGroup) -> dict[int, str]:
    """Rows that cannot be computed whatever the stage holds, by their index, and why. A row that is not ok is none.

    hidden: [tokens, hidden_size], None into the first stage.
    """
    suspicious = not (_are_tokens(batch.token_ids, group) and (hidden is None or all_finite(hidden, group.hidden_dtype)))
    invalid: dict[int, str] = {}
    offsets = batch.offsets()
    for index, row in enumerate(batch.rows):
        if row.status is not Status.OK:
            continue
        reason = _wrong_place(row, group)
        if reason is None and suspicious:
            span = slice(offsets[index], offsets[index + 1])
            reason = _wrong_content(batch.token_ids[span], None if hidden is None else hidden[span], group)
        if reason is not None:
            invalid[index] = reason
    return invalid


def _wrong_place(row: Row, group: LayerGroup) -> str | None:
    if row.length == 0:
        return "the row has no tokens"
    if row.draft_tokens >= row.length:
        return f"{row.draft_tokens} of the row's {row.length} tokens are draft tokens; the first must be known"
    if row.position < 0:
        return f"position {row.position} is negative"
    end = row.position + row.length
    if end > group.max_positions:
        return f"the row ends at position {end}, the model's context is {group.max_positions} tokens"
    return None


def _wrong_content(token_ids: memoryview, hidden: Array | None, group: LayerGroup) -> str | None:
    if not _are_tokens(token_ids, group):
        wrong = next(token for token in token_ids if not 0 <= token < group.vocab_size)
        return f"token id {wrong} is outside the vocabulary of {group.vocab_size}"
    if hidden is not None and not finite_rows(hidden, group.hidden_dtype).all():
        return f"hidden states that came in, ahead of layer {group.first_layer}, are not finite"
    return None


def _are_tokens(token_ids: memoryview, group: LayerGroup) -> bool:
    return not token_ids or (min(token_ids) >= 0 and max(token_ids) < group.vocab_size)
