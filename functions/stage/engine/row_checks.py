"""Checks events before they are computed.

A malformed event fails as a whole. An invalid row is refused, and the other rows of its event are computed.
"""

from eventing.problems import EventTooLarge, MalformedEvent
from eventing.wire.events import MAX_BATCH_TOKENS, MAX_ROWS, Batch, Status, Want
from functions.stage.models.floats import Array, all_finite, finite_rows
from functions.stage.models.layer_group import LayerGroup
from storage.models.embedder import Embedder


def check_event(batch: Batch, group: LayerGroup, wire_dtype: str) -> None:
    """Checks an event as a whole: its number of rows and tokens, the lengths of rows, and the tensor's dtype and shape.

    wire_dtype: the dtype that hidden states must have. Raises MalformedEvent or EventTooLarge.
    """
    tokens = len(batch.token_ids)
    if not 1 <= len(batch.rows) <= MAX_ROWS:
        raise MalformedEvent(f"the batch has {len(batch.rows)} rows, it must have 1 to {MAX_ROWS}")
    if tokens > MAX_BATCH_TOKENS:
        raise EventTooLarge(f"the batch has {tokens} tokens, the most is {MAX_BATCH_TOKENS}")
    total, least = 0, 0
    for row in batch.rows:
        total += row.length
        least = min(least, row.length)
    if least < 0 or total != tokens:
        raise MalformedEvent(f"the rows' lengths add up to {total}, there are {tokens} token ids")
    hidden = batch.hidden
    if group.first_layer == 0:
        if hidden is not None:
            raise MalformedEvent("the batch has a tensor, but the first stage takes token ids alone")
    elif hidden is None:
        if tokens:
            raise MalformedEvent(f"the batch has no tensor, but layer {group.first_layer} takes hidden states")
    elif (hidden.dtype, hidden.shape) != (wire_dtype, (tokens, group.hidden_size)):
        seen, wanted = f"{hidden.dtype} {list(hidden.shape)}", f"{wire_dtype} {[tokens, group.hidden_size]}"
        raise MalformedEvent(f"the tensor is {seen}, this stage takes {wanted}")


def invalid_rows(batch: Batch, hidden: Array | None, group: LayerGroup, embedder: Embedder | None = None) -> dict[int, str]:
    """Finds the rows that can never be computed. Returns a dictionary from the index of a row to the reason.

    Skips rows whose status is not ok. hidden: hidden states [tokens, hidden_size]; None at the first stage. embedder: None for
    a model that generates tokens.
    """
    invalid: dict[int, str] = {}
    for index, row in enumerate(batch.rows):
        if row.status is Status.OK:
            if row.length == 0:
                invalid[index] = "the row has no tokens"
            elif row.draft_tokens >= row.length:
                invalid[index] = (
                    f"{row.draft_tokens} of the row's {row.length} tokens are draft tokens; the first must be known"
                )
            elif row.position < 0:
                invalid[index] = f"position {row.position} is negative"
            elif row.position + row.length > group.max_positions:
                end, context = row.position + row.length, group.max_positions
                invalid[index] = f"the row ends at position {end}, the model's context is {context} tokens"
            elif row.want is Want.VECTOR and row.pooling is None:
                invalid[index] = "the row wants a vector and does not say how to pool"
            elif embedder is not None and row.want in (Want.TOKEN, Want.LOGPROBS):
                invalid[index] = "the model makes vectors of texts, and no tokens; ask /v1/embeddings"
            elif embedder is not None and embedder.in_one_chunk and (row.position or row.following):
                invalid[index] = "the model computes a text in one chunk, and the row is a part of one"
    ids = batch.token_ids
    all_tokens_known = not ids or (min(ids) >= 0 and max(ids) < group.vocab_size)
    if not all_tokens_known or (hidden is not None and not all_finite(hidden, group.hidden_dtype)):
        _find_bad_content(batch, hidden, group, invalid)
    return invalid


def _find_bad_content(batch: Batch, hidden: Array | None, group: LayerGroup, invalid: dict[int, str]) -> None:
    """Adds to `invalid` the rows that have an unknown token or a hidden state that is not finite."""
    begin = 0
    for index, row in enumerate(batch.rows):
        end = begin + row.length
        if row.status is Status.OK and index not in invalid:
            wrong = [token for token in batch.token_ids[begin:end] if not 0 <= token < group.vocab_size]
            if wrong:
                invalid[index] = f"token id {wrong[0]} is outside the vocabulary of {group.vocab_size}"
            elif hidden is not None and not finite_rows(hidden[begin:end], group.hidden_dtype).all():
                invalid[index] = f"hidden states that came into layer {group.first_layer} are not finite"
        begin = end
