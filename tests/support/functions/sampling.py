"""Draws single tokens with the sampler of a stage."""

from collections.abc import Sequence
from typing import Any

from eventing.wire.events import Sampling
from functions.grammars.matcher import Allowed
from functions.stage.engine.sampler import Drawing, draw


def sample(
    logits: Any, sampling: Sampling, position: int, history: Sequence[int], allowed: Allowed | None = None
) -> int | None:
    """Draws a token from float32 logits [vocab]. None if the greatest logit is not finite.

    At temperature 0 the token with the greatest logit is taken, of several equal ones the lowest token id.

    position: of the token that is drawn. history: all tokens before it, prompt included, used only if there is a penalty.
    allowed: bits of the tokens that may be drawn, at least one. None: all are.
    """
    drawing = Drawing(logits[None], sampling, position, history, allowed=None if allowed is None else [allowed])
    draw([drawing])
    return drawing.drawn[0] if drawing.drawn else None
