"""Scoring a text in a single pass: the JSON data of `dev.lamina.score.*`, and the row that goes through the stages for it."""

from typing import Annotated

from msgspec import Meta, Struct

from eventing.wire.events import MAX_BATCH_TOKENS, Row, Want

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]


class ScoreRequest(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Data of `dev.lamina.score.request`. Exactly one of `text` and `token_ids` is given."""

    text: Annotated[str, Meta(min_length=1)] | None = None
    token_ids: Annotated[tuple[TokenId, ...], Meta(min_length=2, max_length=MAX_BATCH_TOKENS)] | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.token_ids is None):
            given = "neither" if self.text is None else "both"
            raise ValueError(f"exactly one of `text` and `token_ids` must be given, not {given}")


class ScoreResponse(Struct, frozen=True):
    """Data of `dev.lamina.score.response`."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Log-probability of each token but the first, given those before it, natural logarithm."""
    logprob_sum: float


def score_row(id_: str, tokens: int) -> Row:
    """A row from position 0 on that wants the log-probability of each of its `tokens` tokens but the first."""
    return Row(id_, attempt=0, position=0, length=tokens, want=Want.LOGPROBS, reserve_tokens=tokens)
