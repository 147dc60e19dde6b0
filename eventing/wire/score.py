"""The one row of a text that is to be scored in a single pass."""

from eventing.wire.events import Row, Want


def score_row(id_: str, tokens: int) -> Row:
    """A row from position 0 on that wants the log-probability of each of its `tokens` tokens but the first."""
    return Row(id_, attempt=0, position=0, length=tokens, want=Want.LOGPROBS, reserve_tokens=tokens)
