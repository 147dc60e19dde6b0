"""Scores a text in a single pass: the JSON data of `dev.lamina.score.*`, and the row that passes through the stages."""

from typing import Annotated

from msgspec import Meta, Struct

from eventing.wire.events import MAX_BATCH_TOKENS, Row, TokenId, Want


class ScoreRequest(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Data of `dev.lamina.score.request`. Exactly one of `text` and `token_ids` is given."""

    text: Annotated[str, Meta(min_length=1)] | None = None
    token_ids: Annotated[tuple[TokenId, ...], Meta(min_length=2, max_length=MAX_BATCH_TOKENS)] | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.token_ids is None):
            given = "neither" if self.text is None else "both"
            raise ValueError(f"exactly one of `text` and `token_ids` must be given, not {given}")


class ScoreResponse(Struct, frozen=True):
    """Data of `dev.lamina.score.response`: the log-probabilities of the text's tokens."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each token but the first, given those before it; natural logarithms
    logprob_sum: float


def score_row(id_: str, tokens: int) -> Row:
    """Returns a row of `tokens` tokens at position 0 that asks for their log-probabilities."""
    return Row(id_, attempt=0, position=0, length=tokens, want=Want.LOGPROBS, reserve_tokens=tokens)
