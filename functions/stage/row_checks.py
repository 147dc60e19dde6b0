"""What makes an event unreadable as a whole, and what makes one of its rows invalid."""

import torch

from eventing.events import MAX_BATCH_TOKENS, MAX_ROWS, Batch, Row
from eventing.problems import EventTooLarge, MalformedEvent
from functions.stage.layer_group import LayerGroup
from functions.stage.wire_tensors import NAMES


def check_event(batch: Batch, group: LayerGroup) -> None:
    """Raises MalformedEvent or EventTooLarge where no row can be told from another, or the tensor is not this stage's."""
    tokens = len(batch.token_ids)
    if not 1 <= len(batch.rows) <= MAX_ROWS:
        raise MalformedEvent(f"the batch has {len(batch.rows)} rows, it must have 1 to {MAX_ROWS}")
    if tokens > MAX_BATCH_TOKENS:
        raise EventTooLarge(f"the batch has {tokens} tokens, the most is {MAX_BATCH_TOKENS}")
    lengths = [row.length for row in batch.rows]
    if min(lengths) < 0 or sum(lengths) != tokens:
        raise MalformedEvent(f"the rows' lengths add up to {sum(lengths)}, there are {tokens} token ids")
    _check_hidden(batch, group, tokens)


def _check_hidden(batch: Batch, group: LayerGroup, tokens: int) -> None:
    hidden = batch.hidden
    if group.first_layer == 0:
        if hidden is not None:
            raise MalformedEvent("the batch has a tensor, but the first stage takes token ids alone")
        return
    if hidden is None:
        if tokens:
            raise MalformedEvent(f"the batch has no tensor, but layer {group.first_layer} takes hidden states")
        return
    wanted = (NAMES[group.hidden_dtype], (tokens, group.hidden_size))
    if (hidden.dtype, hidden.shape) != wanted:
        seen = f"{hidden.dtype} {list(hidden.shape)}"
        raise MalformedEvent(f"the tensor is {seen}, this stage takes {wanted[0]} {list(wanted[1])}")


def invalid_because(row: Row, token_ids: torch.Tensor, group: LayerGroup) -> str | None:
    """Why the row cannot be computed whatever the stage holds; None where it can. token_ids: the row's own."""
    if row.length == 0:
        return "the row has no tokens"
    if row.position < 0:
        return f"position {row.position} is negative"
    end = row.position + row.length
    if end > group.max_positions:
        return f"the row ends at position {end}, the model's context is {group.max_positions} tokens"
    least, greatest = (int(value) for value in token_ids.aminmax())
    if least < 0 or greatest >= group.vocab_size:
        wrong = least if least < 0 else greatest
        return f"token id {wrong} is outside the vocabulary of {group.vocab_size}"
    return None


def finite_tokens(hidden: torch.Tensor) -> torch.Tensor:
    """bool [tokens]: whether all hidden states of a token are finite. One pass over the memory: a sum keeps NaN and inf."""
    return hidden.sum(dim=-1, dtype=torch.float32).isfinite()
