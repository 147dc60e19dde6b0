"""Samples tokens from logits, as a pure function of logits, sampling values, seed and position.

Filters are those of transformers' `generate`, in its order: repetition penalty, temperature, top-k, top-p, min-p. Before the
temperature come the OpenAI API's penalties, biases and banned tokens, and before everything a grammar's mask. If values are
so small that float32 overflows, the same is computed in float64: every `Sampling` draws a token.

Each token has a weight, its probability up to a factor, and a number from a counter-based generator (Philox) keyed by seed and
position. The draw takes the token whose exponential variate divided by its weight is the least, which is a draw from the
softmax. So a replay draws the same token, whatever the batch, the cut or the machine. Logits that are rounded differently in
another batch change the outcome of this comparison far more seldom than that of a cumulative sum over the vocabulary.

What takes time runs in C (`functions/stage/native/c/sampler.inc.h`), and without C in `numpy_sampler`, with the same bits.
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
    """The next token of a sequence, and one more after each draft token that is accepted: one that was drawn, too."""

    logits: Floats  # float32 [draft tokens + 1, vocab]
    sampling: Sampling
    position: int  # of the first token drawn
    history: Sequence[int] = ()  # all tokens before it, prompt included, used only if there is a penalty
    draft_tokens: Sequence[int] = ()
    # The grammar's bits, for the first token and for the token after each draft token that it allows. None: all are allowed.
    allowed: Sequence[Allowed] | None = None
    drawn: list[int] = field(default_factory=list)  # the result; empty if the first logits are not finite

    def take(self, token: int | None) -> bool:
        """Adds a token. Returns whether there is another one to draw."""
        if token is None:
            return False
        self.drawn.append(token)
        count = len(self.drawn)
        is_accepted_draft = count < len(self.logits) and token == self.draft_tokens[count - 1]
        return is_accepted_draft and (self.allowed is None or count < len(self.allowed))

    def adjusted(self, logits: Floats, repetition_penalty: float) -> Floats:
        """The logits of the next token after penalties, biases and bans; a copy unless there are none."""
        count = len(self.drawn)
        history = [*self.history, *self.draft_tokens[:count]] if count and self.sampling.adjusts else self.history
        return _adjust(logits, self.sampling, self.position + count, history, repetition_penalty)


def draw(drawings: Sequence[Drawing], threads: NativeThreads | None = None) -> None:
    """Draws the tokens of several sequences, which share one vocabulary. threads: share the work, if it is done in C."""
    while drawings:
        tokens = _draw_next(drawings, threads)
        drawings = [drawing for drawing, token in zip(drawings, tokens, strict=True) if drawing.take(token)]


def _draw_next(drawings: Sequence[Drawing], threads: NativeThreads | None) -> list[int | None]:
    """One token of each sequence; None if the greatest logit is not finite."""
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
    """The log-probability of each of `token_ids` [n] under `logits`, float32 [n, vocab], and each row's most probable tokens.

    most_probable: how many of these. Of equally probable tokens the lowest id comes first; tokens of probability 0 are left
    out. Logarithms are natural, and taken before penalties, temperature and filters. A row with a NaN or an infinite maximum
    gives NaN. Works row by row, so that memory stays at one row.
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
    """Whether tokens are drawn in C; else in numpy, which gives the same tokens but is slower."""
    try:
        library()
    except UNAVAILABLE:
        return False
    return True


def _draw_widely(drawing: Drawing, wanted: native_sampler.Draw) -> int | None:
    """Draws where float32 overflows, or all tokens that may come are banned. wanted: the draw that gave no token."""
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
    """Applies the penalties, biases and bans of `sampling`; a copy unless there are none.

    Ignores tokens outside the vocabulary.
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
