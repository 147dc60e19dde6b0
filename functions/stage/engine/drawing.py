"""The tokens that the last stage draws for a row: one, and one more behind each draft token that comes true."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from eventing.wire.events import Sampling
from functions.grammars.matcher import Allowed
from functions.stage.engine.sampler import sample
from functions.stage.models.floats import Float32


@dataclass(slots=True)
class Drawing:
    """Of one row. A token is drawn only where all before it are as they were drafted."""

    sampling: Sampling
    token_ids: Sequence[int]
    """The sequence's so far, the row's and its draft tokens at the end."""
    end: int
    """Behind the row's last token, draft tokens included: a position in the sequence."""
    draft_tokens: int
    logits: Float32
    """[draft tokens + 1, vocab]."""
    allowed: Sequence[Allowed] | None = None
    """By its grammar: at the first place, and behind each draft token that is allowed itself. None: everything."""
    tokens: list[int] = field(default_factory=list)
    goes_on: bool = True

    @property
    def position(self) -> int:
        """Of the token that is drawn next."""
        return self.end - self.draft_tokens + len(self.tokens)

    def drew(self, token: int | None) -> None:
        """None: the logits are no numbers, which says nothing of the tokens before."""
        draft = self.token_ids[self.position] if len(self.tokens) < self.draft_tokens else None
        if token is not None:
            self.tokens.append(token)
        known = self.allowed is None or len(self.tokens) < len(self.allowed)  # not behind the end, even where it was drafted
        self.goes_on = token is not None and token == draft and known


def draw(drawings: Sequence[Drawing]) -> None:
    """Until none of them goes on; one that has no token then has none to answer with."""
    while going := [each for each in drawings if each.goes_on]:
        tokens = sample(
            [each.logits[len(each.tokens)] for each in going],
            [each.sampling for each in going],
            [each.position for each in going],
            [each.token_ids[: each.position] for each in going],
            [None if each.allowed is None else each.allowed[len(each.tokens)] for each in going],
        )
        for each, token in zip(going, tokens, strict=True):
            each.drew(token)
