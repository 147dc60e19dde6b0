"""Samples tokens from logits, as a pure function of logits, sampling values, seed and position.

The order of filters is that of transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p. The OpenAI
API's penalties, biases and banned tokens, and the mask of a grammar, come before the temperature. If sampling values are so
small that float32 overflows, the draw is repeated in float64, so that every `Sampling` draws a token.

Each token has a weight, which is proportional to its probability, and an exponential variate. The variate comes from a
counter-based generator (Philox) keyed by seed and position. The token with the least variate / weight is drawn, which is a draw
from the softmax. So a replay draws the same token, whatever the batch, the cut of the model or the machine. If logits are
rounded differently in another batch, this comparison seldom changes; a cumulative sum over the vocabulary would change more
often.

The slow parts run in C (`functions/stage/native/c/sampler.inc.h`). Without C, `numpy_sampler` computes the same bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from eventing.wire.events import Sampling
from functions.grammars.matcher import Allowed
from functions.stage.engine import numpy_sampler
from functions.stage.native import sampler as native_sampler
from functions.stage.native.layers import NativeThreads
from functions.stage.native.library import UNAVAILABLE, library

Floats = npt.NDArray[np.floating[Any]]
Tokens = npt.NDArray[np.int64]
TopLogprobs = tuple[tuple[int, float], ...]  # token ids with their log-probabilities

GREEDY: Final = Sampling()
_LEAST_DIVISOR: Final = 1e-100  # smaller divisors order the tokens no differently: any float32 divided by this is larger


@dataclass(slots=True)
class Drawing:
    """A draw of the next tokens of one sequence: one token, and one more after each accepted draft token.

    A draft token is accepted if the drawn token equals it.
    """

    logits: Floats  # float32 [draft tokens + 1, vocab]
    sampling: Sampling
    position: int  # of the first token drawn
    history: Sequence[int] = ()  # all tokens before it, prompt included, used only if there is a penalty
    draft_tokens: Sequence[int] = ()
    # Masks from the grammar: for the first token, and for the token after each allowed draft token. None: no grammar.
    allowed: Sequence[Allowed] | None = None
    drawn: list[int] = field(default_factory=list)  # the result; empty if the first logits are not finite

    def take(self, token: int | None) -> bool:
        """Adds a drawn token. Returns whether another token must be drawn. If `token` is None, the drawing ends."""
        if token is None:
            return False
        self.drawn.append(token)
        count = len(self.drawn)
        is_accepted_draft = count < len(self.logits) and token == self.draft_tokens[count - 1]
        return is_accepted_draft and (self.allowed is None or count < len(self.allowed))

    def adjusted(self, logits: Floats, repetition_penalty: float) -> Floats:
        """Returns the logits of the next token with penalties, biases and bans applied.

        Returns `logits` itself if there are none of these, otherwise a copy.
        """
        count = len(self.drawn)
        history = [*self.history, *self.draft_tokens[:count]] if count and self.sampling.adjusts else self.history
        return _adjust(logits, self.sampling, self.position + count, history, repetition_penalty)


def draw(drawings: Sequence[Drawing], threads: NativeThreads | None = None) -> None:
    """Draws tokens for several sequences with the same vocabulary, and stores them in `Drawing.drawn`.

    threads: C threads that share the work; ignored if numpy draws the tokens.
    """
    while drawings:
        tokens = _draw_next(drawings, threads)
        drawings = [drawing for drawing, token in zip(drawings, tokens, strict=True) if drawing.take(token)]


def _draw_next(drawings: Sequence[Drawing], threads: NativeThreads | None) -> list[int | None]:
    """Draws one token for each sequence. A token is None if the greatest logit is not finite."""
    draws: list[native_sampler.Draw] = []
    with np.errstate(all="ignore"):  # overflow is detected, and computed in float64
        for drawing in drawings:
            count, sampling = len(drawing.drawn), drawing.sampling
            logits = drawing.logits[count]
            if sampling.adjusts and math.isfinite(logits.max()):
                logits = drawing.adjusted(logits, sampling.repetition_penalty)
            draws.append(
                native_sampler.Draw(
                    logits,
                    sampling.temperature,
                    min(sampling.top_k, len(logits)),
                    sampling.top_p,
                    sampling.min_p,
                    sampling.seed,
                    drawing.position + count,
                    None if drawing.allowed is None else drawing.allowed[count],
                )
            )
        tokens = native_sampler.draw(draws, threads) if is_native() else [numpy_sampler.draw(each) for each in draws]
        for place, (token, drawing) in enumerate(zip(tokens, drawings, strict=True)):
            if token is None and math.isfinite(drawing.logits[len(drawing.drawn)].max()):
                tokens[place] = _draw_widely(drawing, draws[place])
    return tokens


def log_probabilities(
    logits: npt.NDArray[np.float32], token_ids: Sequence[int] | Tokens, most_probable: int = 0
) -> list[tuple[float, TopLogprobs]]:
    """Returns the log-probability of each of `token_ids` [n] under `logits`, float32 [n, vocab], and the most probable tokens.

    most_probable: how many of the most probable tokens each row gets. The lowest id comes first among equally probable tokens,
    and tokens of probability 0 are omitted. Logarithms are natural. Penalties, temperature and filters do not apply. A row
    with a NaN or an infinite maximum gives NaN and no tokens. Takes memory for one row only.
    """
    softmax = native_sampler.softmax if is_native() else numpy_sampler.softmax
    found: list[tuple[float, TopLogprobs]] = []
    for row, token in zip(logits, token_ids, strict=True):
        greatest = row.max()
        if not math.isfinite(greatest):
            found.append((math.nan, ()))
            continue
        log_sum, top = softmax(row, min(most_probable, len(row)))
        logprobs = (row[[int(token), *top]] - greatest).astype(np.float64) - log_sum
        ranked = zip(top, logprobs[1:].tolist(), strict=True)
        found.append((float(logprobs[0]), tuple(each for each in ranked if math.isfinite(each[1]))))
    return found


@cache
def is_native() -> bool:
    """Whether C draws the tokens. Otherwise numpy draws the same tokens, but takes longer."""
    try:
        library()
    except UNAVAILABLE:
        return False
    return True


def _draw_widely(drawing: Drawing, wanted: native_sampler.Draw) -> int | None:
    """Repeats in float64 a draw that gave no token. If all allowed tokens are banned, ignores penalties, biases and bans.

    wanted: the draw that gave no token, because float32 overflowed or because of the bans.
    """
    scores = drawing.logits[len(drawing.drawn)].astype(np.float64)
    if wanted.allowed is not None:
        scores = numpy_sampler.masked(scores, wanted.allowed)
    adjusted = drawing.adjusted(scores, max(drawing.sampling.repetition_penalty, _LEAST_DIVISOR))
    if not math.isfinite(adjusted.max()):  # all tokens are banned
        adjusted = scores
    if wanted.temperature == 0:
        return int(adjusted.argmax())
    # The greatest score becomes 0, those far below it -inf.
    scaled = ((adjusted - adjusted.max()) / max(wanted.temperature, _LEAST_DIVISOR)).astype(np.float32)
    draw = replace(wanted, logits=scaled, temperature=1.0, allowed=None)
    return native_sampler.draw([draw])[0] if is_native() else numpy_sampler.draw(draw)


def _adjust(scores: Floats, sampling: Sampling, position: int, history: Sequence[int], repetition_penalty: float) -> Floats:
    """Returns the scores with the penalties, biases and bans of `sampling` applied.

    Returns `scores` itself if there are none of these, otherwise a copy. Ignores biases and bans of tokens outside the
    vocabulary.
    """
    if not sampling.adjusts:
        return scores
    adjusted = scores.copy()
    if repetition_penalty != 1:
        seen = np.unique(np.asarray(history, dtype=np.int64))
        of_seen = scores[seen]
        adjusted[seen] = np.where(of_seen < 0, of_seen * repetition_penalty, of_seen / repetition_penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        drawn, times = np.unique(np.asarray(history[sampling.prompt_tokens :], dtype=np.int64), return_counts=True)
        adjusted[drawn] -= (sampling.presence_penalty + sampling.frequency_penalty * times).astype(adjusted.dtype)
    for token, bias in sampling.logit_bias.items():
        if token < len(adjusted):
            adjusted[token] += bias
    if position < sampling.banned_until:
        adjusted[[token for token in sampling.banned if token < len(adjusted)]] = -np.inf
    return adjusted
