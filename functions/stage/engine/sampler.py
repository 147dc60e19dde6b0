"""Logits → tokens, as a pure function of logits, sampling values, seed and position.

The filters are those of transformers' `generate`, in its order: repetition penalty, temperature, top-k, top-p, min-p; before
the temperature, too, the OpenAI API's penalties and biases, and tokens that are banned for a while. Where
values are so small that float32 overflows there, the same is computed in float64: any `Sampling` draws a token.
A grammar's mask comes ahead of all of them.
The draw takes the token with the largest score plus Gumbel noise, which is a draw from the softmax of the scores. The
noise comes from a counter-based generator (Philox) keyed by seed and position, one number for each token of the
vocabulary: a replay draws the same token, whatever the batch, the cut or the machine. Rounding in the logits that comes
with another batch moves a token across this comparison far more seldom than across a cumulative sum over the vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from eventing.wire.events import Sampling

Floats = npt.NDArray[np.floating[Any]]
Tokens = npt.NDArray[np.int64]
TopLogprobs = tuple[tuple[int, float], ...]
"""Token ids with their log-probabilities."""

GREEDY: Final = Sampling()
_NUCLEUS_AT_FIRST: Final = 512
"""Looked for among so many, a nucleus of 49k tokens takes a quarter of the time that sorting all of them takes."""
_LEAST_DIVISOR: Final = 1e-100
"""A smaller penalty or temperature orders the tokens no differently: any float32 divided by this is beyond all others."""


def sample(
    logits: Sequence[npt.NDArray[np.float32]] | npt.NDArray[np.float32],
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    histories: Sequence[Sequence[int]],
    allowed: Sequence[npt.NDArray[np.bool_] | None] | None = None,
) -> list[int | None]:
    """One token for each row of logits, float32 [n, vocab] or n of them [vocab]; None where the greatest is not finite.

    positions: of the tokens that are drawn, counted in their sequences. histories: all tokens before them, prompt
    included; looked at only where there is a penalty. allowed: the tokens that a row may draw, at least one, where it may not
    draw all; what it has no place for is not allowed. Of equal greatest logits the lowest token is taken.
    """
    greedy = [int(row.argmax()) for row in logits]  # of NaN the first
    rows = zip(greedy, logits, samplings, positions, histories, allowed or [None] * len(greedy), strict=True)
    with np.errstate(all="ignore"):  # what overflows is seen, and computed in float64
        return [
            None
            if not math.isfinite(row[token])
            else token
            if sampling.temperature == 0 and not sampling.adjusts and (mask is None or (token < len(mask) and mask[token]))
            else _sample_row(row, sampling, position, history, mask)
            for token, row, sampling, position, history, mask in rows
        ]


def log_probabilities(
    logits: npt.NDArray[np.float32], token_ids: Sequence[int] | Tokens, most_probable: int = 0
) -> list[tuple[float, TopLogprobs]]:
    """Natural logarithm of the probability of `token_ids` [n] under `logits`, float32 [n, vocab], unfiltered; and of so many of
    the most probable tokens of each row, of equal ones the lowest, as far as they have a probability at all.

    Row by row, so that memory stays at one row. A row with a logit that is no number, or beyond all, has none: NaN.
    """
    with np.errstate(all="ignore"):
        return [_log_probability(row, int(token), most_probable) for row, token in zip(logits, token_ids, strict=True)]


def _log_probability(row: Floats, token: int, most_probable: int) -> tuple[float, TopLogprobs]:
    greatest = row.max()
    log_sum = math.log(np.exp(row - greatest).sum())
    top = _largest(row, min(most_probable, len(row))) if most_probable else ()
    found = [(int(each), float(row[each] - greatest) - log_sum) for each in top]
    return float(row[token] - greatest) - log_sum, tuple(pair for pair in found if math.isfinite(pair[1]))


def _masked(row: Floats, mask: npt.NDArray[np.bool_]) -> Floats:
    masked = np.full_like(row, -np.inf)
    known = min(len(row), len(mask))
    np.copyto(masked[:known], row[:known], where=mask[:known])
    return masked


def _sample_row(
    scores: Floats, sampling: Sampling, position: int, history: Sequence[int], mask: npt.NDArray[np.bool_] | None
) -> int:
    if mask is not None:
        scores = _masked(scores, mask)
    adjusted = _adjust(scores, sampling, position, history, sampling.repetition_penalty)
    if sampling.temperature == 0:
        if not math.isfinite(adjusted.max()):
            adjusted = _adjust_widely(scores, sampling, position, history)
        return int(adjusted.argmax())
    scaled = adjusted / sampling.temperature
    if not math.isfinite(scaled.max()):
        adjusted = _adjust_widely(scores, sampling, position, history)
        # The greatest becomes 0, and what is far below it -inf.
        scaled = ((adjusted - adjusted.max()) / max(sampling.temperature, _LEAST_DIVISOR)).astype(np.float32)
    # What is not allowed costs nothing more, which mostly is nearly all.
    kept_scores, tokens = keep(scaled, sampling, None if mask is None else np.flatnonzero(mask[: len(scaled)]))
    noise = _gumbel(sampling.seed, position, len(scores), tokens)
    return int(tokens[np.argmax(kept_scores.astype(np.float64) + noise)])


def _adjust_widely(scores: Floats, sampling: Sampling, position: int, history: Sequence[int]) -> Floats:
    """Where float32 overflows."""
    penalty = max(sampling.repetition_penalty, _LEAST_DIVISOR)
    adjusted = _adjust(scores.astype(np.float64), sampling, position, history, penalty)
    return adjusted if math.isfinite(adjusted.max()) else scores.astype(np.float64)  # every token is banned: none is


def _adjust(scores: Floats, sampling: Sampling, position: int, history: Sequence[int], repetition_penalty: float) -> Floats:
    """Penalties, biases and bans, before the temperature. Tokens that the vocabulary does not have are passed over."""
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


def keep(scores: Floats, sampling: Sampling, tokens: Tokens | None = None) -> tuple[Floats, Tokens]:
    """The scores, and their tokens, that top-k, top-p and min-p leave of float32 [vocab]. tokens: the only ones, ascending;
    None: all."""
    tokens = np.arange(len(scores)) if tokens is None else tokens
    if 0 < sampling.top_k < len(tokens):
        among = scores[tokens]
        tokens = tokens[among >= np.partition(among, -sampling.top_k)[-sampling.top_k]]
    if sampling.top_p < 1:
        tokens = tokens[_nucleus(_softmax(scores[tokens]), sampling.top_p)]
    if sampling.min_p:
        probabilities = _softmax(scores[tokens])
        tokens = tokens[probabilities >= np.float32(sampling.min_p) * probabilities.max()]
    return scores[tokens], tokens


def _softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max())
    probabilities: Floats = powers / powers.sum()
    return probabilities


def _nucleus(probabilities: Floats, top_p: float) -> Tokens:
    """Indexes of the most probable tokens, as many as it takes to reach `top_p`; looked for among few before among all."""
    for size in (_NUCLEUS_AT_FIRST, len(probabilities)):
        order = _largest(probabilities, min(size, len(probabilities)))
        largest = probabilities[order]
        reached = np.cumsum(largest, dtype=np.float64).astype(np.float32) - largest >= top_p
        reached[0] = False  # also where top_p rounds to 0
        kept = order[~reached]
        if len(kept) < len(order):
            break
    return kept


def _largest(probabilities: Floats, count: int) -> Tokens:
    """Indexes of the `count` largest, the largest first, of equal ones the lowest."""
    some = np.sort(np.argpartition(probabilities, -count)[-count:])
    order: Tokens = some[np.argsort(-probabilities[some], kind="stable")]
    return order


def _gumbel(seed: int, position: int, vocab_size: int, tokens: Tokens) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise of `tokens`: numpy keeps the stream of raw Philox numbers stable across versions."""
    raw = np.random.Philox(key=[seed, 0], counter=[0, position, 0, 0]).random_raw(vocab_size)[tokens]
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))
