"""Samples tokens from logits, as a pure function of logits, sampling values, seed and position.

Filters are those of transformers' `generate`, in its order: repetition penalty, temperature, top-k, top-p, min-p. Before the
temperature come the OpenAI API's penalties, biases and banned tokens, and before everything a grammar's mask. If values are
so small that float32 overflows, the same is computed in float64: every `Sampling` draws a token.

Each token has a weight, its probability up to a factor, and a number from a counter-based generator (Philox) keyed by seed and
position. The draw takes the token whose exponential variate divided by its weight is the least, which is a draw from the
softmax. So a replay draws the same token, whatever the batch, the cut or the machine. Logits that are rounded differently in
another batch change the outcome of this comparison far more seldom than that of a cumulative sum over the vocabulary.

What takes time runs in C (`functions/stage/native/c/sampler.inc.h`); numpy gives the same bits on machines without it.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from eventing.wire.events import Sampling
from functions.stage.native import sampler as native_sampler
from functions.stage.native.library import UNAVAILABLE, library

Floats = npt.NDArray[np.floating[Any]]
Tokens = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
TopLogprobs = tuple[tuple[int, float], ...]  # token ids with their log-probabilities

GREEDY: Final = Sampling()
_LEAST_DIVISOR: Final = 1e-100  # smaller divisors order the tokens no differently: any float32 divided by this is larger
_LOWEST: Final = np.float32(-87)  # tokens whose score is farther below the greatest have weight 0
_WEIGHT_STEPS: Final = 2.0**40  # weights are summed as integers: the order of a sum does not matter
_LOGARITHM: Final = (
    0.15313837699209373,
    0.1818357216161805,
    0.22222198432149784,
    0.2857142874366239,
    0.3999999999940942,
    0.6666666666666735,
)


def draw(
    logits: Floats, sampling: Sampling, token_ids: Sequence[int], position: int, allowed: Sequence[Mask] | None = None
) -> list[int]:
    """Draws the next token of a sequence, and one more after each draft token that is accepted: one that was drawn, too.

    Returns the tokens drawn, none if the first logits are not finite. logits: float32 [draft tokens + 1, vocab]. token_ids: of
    the sequence, draft tokens at the end. position: of the first token drawn. allowed: the grammar's masks, for the first token
    and for the token after each draft token that the grammar allows; None: there is no grammar.
    """
    drawn: list[int] = []
    for row in logits:
        mask = None if allowed is None else allowed[len(drawn)]
        token = sample(row, sampling, position, token_ids[:position] if sampling.adjusts else (), mask)
        if token is None:
            break
        drawn.append(token)
        is_accepted_draft = len(drawn) < len(logits) and token == token_ids[position]
        if not is_accepted_draft or (allowed is not None and len(drawn) == len(allowed)):
            break
        position += 1
    return drawn


def sample(
    logits: Floats, sampling: Sampling, position: int, history: Sequence[int], allowed: Mask | None = None
) -> int | None:
    """Draws a token from float32 logits [vocab]. None if the greatest logit is not finite.

    At temperature 0 the token with the greatest logit is taken, of several equal ones the lowest token id.

    position: of the token that is drawn. history: all tokens before it, prompt included, used only if there is a penalty.
    allowed: True for tokens that may be drawn, at least one; tokens beyond its end are not allowed. None: all are.
    """
    greatest = int(logits.argmax())  # the first NaN, if there is one
    if not math.isfinite(logits[greatest]):
        return None
    is_allowed = allowed is None or (greatest < len(allowed) and allowed[greatest])
    if sampling.temperature == 0 and not sampling.adjusts and is_allowed:
        return greatest
    with np.errstate(all="ignore"):  # overflow is detected, and computed in float64
        return _sample_adjusted(logits, sampling, position, history, allowed)


def log_probabilities(
    logits: npt.NDArray[np.float32], token_ids: Sequence[int] | Tokens, most_probable: int = 0
) -> list[tuple[float, TopLogprobs]]:
    """The log-probability of each of `token_ids` [n] under `logits`, float32 [n, vocab], and each row's most probable tokens.

    most_probable: how many of these. Of equally probable tokens the lowest id comes first; tokens of probability 0 are left
    out. Logarithms are natural, and taken before penalties, temperature and filters. A row with a NaN or an infinite maximum
    gives NaN. Works row by row, so that memory stays at one row.
    """
    softmax = native_sampler.softmax if is_native() else softmax_in_numpy
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


def softmax_in_numpy(scores: Floats, count: int) -> tuple[float, list[int]]:
    """As `native.sampler.softmax`, to the bit, where C cannot be used."""
    total = np.rint(_weights(scores).astype(np.float64) * _WEIGHT_STEPS).astype(np.int64).sum()
    log_sum = _logarithm(np.array([float(total) / _WEIGHT_STEPS]))
    return float(log_sum[0]), np.argsort(-scores, kind="stable")[:count].tolist()


@cache
def is_native() -> bool:
    """Whether tokens are drawn in C; else in numpy, which gives the same tokens but is slower."""
    try:
        library()
    except UNAVAILABLE:
        return False
    return True


def _sample_adjusted(scores: Floats, sampling: Sampling, position: int, history: Sequence[int], mask: Mask | None) -> int:
    if mask is not None:
        masked = np.full_like(scores, -np.inf)
        known = min(len(scores), len(mask))
        np.copyto(masked[:known], scores[:known], where=mask[:known])
        scores = masked
    adjusted = _adjust(scores, sampling, position, history, sampling.repetition_penalty)
    if sampling.temperature == 0:
        if not math.isfinite(adjusted.max()):
            adjusted = _adjust_widely(scores, sampling, position, history)
        return int(adjusted.argmax())
    scaled = adjusted / sampling.temperature
    if not math.isfinite(scaled.max()):
        adjusted = _adjust_widely(scores, sampling, position, history)
        # The greatest score becomes 0, those far below it -inf.
        scaled = ((adjusted - adjusted.max()) / max(sampling.temperature, _LEAST_DIVISOR)).astype(np.float32)
    if is_native():
        return native_sampler.draw(
            scaled, min(sampling.top_k, len(scaled)), sampling.top_p, sampling.min_p, sampling.seed, position
        )
    return draw_in_numpy(scaled, sampling, position)


def draw_in_numpy(scores: Floats, sampling: Sampling, position: int) -> int:
    """Draws as C does, to the bit, where C cannot be used. scores: float32 [vocab], the greatest is finite."""
    weights, tokens = keep(scores, sampling)
    tokens, weights = tokens[weights > 0], weights[weights > 0]
    return int(tokens[np.argmin(_variates(sampling.seed, position, tokens) / weights.astype(np.float64))])


def _adjust_widely(scores: Floats, sampling: Sampling, position: int, history: Sequence[int]) -> Floats:
    """As `_adjust`, in float64, for values that overflow float32. Returns `scores` unchanged if all tokens are banned."""
    penalty = max(sampling.repetition_penalty, _LEAST_DIVISOR)
    adjusted = _adjust(scores.astype(np.float64), sampling, position, history, penalty)
    return adjusted if math.isfinite(adjusted.max()) else scores.astype(np.float64)


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


def keep(scores: Floats, sampling: Sampling) -> tuple[Floats, Tokens]:
    """Applies top-k, top-p and min-p to float32 scores [vocab]. Returns the weights of the tokens that remain, and their ids.

    A weight is exp(score - greatest score).
    """
    weights = _weights(scores)
    tokens = np.argsort(-scores, kind="stable")  # of equal scores the lowest id first
    if 0 < sampling.top_k < len(tokens):
        tokens = tokens[scores[tokens] >= scores[tokens[sampling.top_k - 1]]]
    if sampling.top_p < 1:
        masses = np.rint(weights[tokens].astype(np.float64) * _WEIGHT_STEPS).astype(np.int64)
        tokens = tokens[np.cumsum(masses) - masses < sampling.top_p * float(masses.sum())]
    tokens = np.sort(tokens[weights[tokens] >= np.float32(sampling.min_p)])
    return weights[tokens], tokens


def _weights(scores: Floats) -> Floats:
    """exp(score - greatest score), computed as `weigh` in `functions/stage/native/c/sampler.inc.h` does."""
    x = scores - scores.max()
    limited = np.maximum(x, _LOWEST)
    n = np.rint(limited * np.float32(1.44269504))
    r = limited - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    y = np.full_like(r, 1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = y * r + np.float32(factor)
    y = y * (r * r) + r + np.float32(1)
    return np.where(x < _LOWEST, np.float32(0), y * ((n.astype(np.int32) + 127) << 23).view(np.float32))


def _variates(seed: int, position: int, tokens: Tokens) -> npt.NDArray[np.float64]:
    """Exponential variates of `tokens`, ascending ids. A token's number depends only on seed, position and the token's id.

    numpy keeps the stream of raw Philox numbers stable across versions.
    """
    raw = np.random.Philox(key=[seed, 0], counter=[0, position, 0, 0]).random_raw(int(tokens[-1]) + 1)[tokens]
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -_logarithm(np.minimum(uniform, 1 - 2.0**-53))


def _logarithm(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Natural logarithm, computed as in `functions/stage/native/c/sampler.inc.h`: numpy's differs between CPUs."""
    fraction, exponent = np.frexp(x)
    is_small = fraction < 0.7071067811865476
    fraction, exponent = np.where(is_small, fraction * 2, fraction), (exponent - is_small).astype(np.float64)
    f = fraction - 1
    s = f / (2 + f)
    z = s * s
    r = np.full_like(z, 0.14798198605116586)
    for factor in _LOGARITHM:
        r = r * z + factor
    logarithm: npt.NDArray[np.float64] = exponent * 0.6931471803691238 + (
        s * (r * z) + exponent * 1.9082149292705877e-10 + 2 * s
    )
    return logarithm
