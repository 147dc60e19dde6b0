"""Speculative decoding: chooses which tokens are drafted for a sequence, and how many of them a step carries.

Drafts come from prompt lookup. It finds the last tokens at an earlier place in prompt or answer, or in the text that the client
expects. The tokens that followed there are the draft. An accepted draft token saves the sequence a step; a rejected one has
cost compute. A step carries as many as raise the tokens per second.

The chance of acceptance is estimated from the sequence's own drafts, and from those of all sequences while it has few. Costs
are measured (`stats.RowCosts`). Drafts do not change answers: the last stage draws the same tokens without them.
"""

from array import array
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Final

from functions.gateway.scheduling.stats import RowCosts, seconds_on

MATCH_TOKENS: Final = (2, 3, 4, 6, 8, 12, 16, 32)  # suffix lengths looked up; a single token stands in too many places
MAX_LOOKED_UP_TOKENS: Final = 16_384  # the latest ones, some 10 µs; a whole long context would slow down every step
_TOKEN_BYTES: Final = 4
_LONG_MATCH_TOKENS: Final = 4  # from this length on a match counts as a quotation, with an acceptance rate of its own
_DECAY: Final = 0.9  # share of a sequence's counts that is kept each round
_SHARED_DECAY: Final = 0.99  # the same for the counts of all sequences
_PRIOR_WEIGHT: Final = 2.0  # weight of the shared rate beside the sequence's own counts, in draft tokens
_STOP_SHARE: Final = 0.8  # stops the search when the rate falls below this share of the best
_MARGIN: Final = 1.25  # a draft token must be worth its cost this many times: the best-looking estimates are often errors
_MIN_GAIN: Final = 1 / 256  # expected tokens below which a draft token is not considered


class PromptLookup:
    """Drafts for one sequence the tokens that followed its last tokens earlier in the text. Not thread-safe.

    Takes the longest match, at its latest place. Keeps prompt, answer and expected text in memory, four bytes a token.
    """

    def __init__(self, token_ids: Items[int], predicted: Items[int] = ()) -> None:
        """Makes the text to search, of the prompt `token_ids` and of `predicted`.

        `predicted` are tokens that the client expects the answer to have.
        """
        self._predicted = _bytes(predicted[:MAX_LOOKED_UP_TOKENS])
        self._text = self._predicted + _bytes(token_ids)  # one text, so that one search finds both
        self._matched = 0  # bytes of `predicted` that the answer has repeated so far; -1: it has left the prediction

    def add(self, token: int) -> None:
        drawn = _bytes([token])
        if self._matched >= 0 and self._predicted.startswith(drawn, self._matched):
            self._matched += _TOKEN_BYTES
        else:
            self._matched = -1
        self._text += drawn

    def draft(self, max_tokens: int) -> tuple[tuple[int, ...], int]:
        """Returns at most `max_tokens` draft tokens, and the number of matching tokens before them.

        Returns ((), 0) without a match.
        """
        if 0 <= self._matched < len(self._predicted):
            draft = self._predicted[self._matched :][: max_tokens * _TOKEN_BYTES]
            return tuple(memoryview(draft).cast("i")), max(MATCH_TOKENS[0], self._matched // _TOKEN_BYTES)
        end, match = self._longest_match()
        if not match:
            return (), 0
        size = max_tokens * _TOKEN_BYTES
        found = self._text[end : end + size]
        # A repeating text has its last repetition at its end: the draft repeats it further.
        return tuple(memoryview((found * -(-size // len(found)))[:size]).cast("i")), match

    def _longest_match(self) -> tuple[int, int]:
        """Finds the longest suffix of the text that also occurs earlier, among the lengths MATCH_TOKENS.

        Returns the byte offset at which its latest earlier occurrence ends, and its length in tokens. Returns (0, 0) without a
        match.
        """
        best = (0, 0)
        first = max(0, len(self._text) - MAX_LOOKED_UP_TOKENS * _TOKEN_BYTES)
        for tokens in MATCH_TOKENS:
            size = tokens * _TOKEN_BYTES
            if len(self._text) <= size:
                break
            suffix, end = self._text[-size:], len(self._text) - 1
            while (place := self._text.rfind(suffix, first, end)) >= 0 and place % _TOKEN_BYTES:
                end = place + size - 1  # these bytes begin within a token
            if place < 0:
                break
            best = (place + size, tokens)
        return best


def _bytes(token_ids: Items[int]) -> bytearray:
    return bytearray(array("i", token_ids).tobytes())


@dataclass(slots=True)
class AcceptanceRate:
    """Decaying counts of accepted draft tokens, and of drafts in which a token was rejected."""

    decay: float = _DECAY
    accepted: float = 0.0
    rejected: float = 0.0

    def estimate(self, prior: float) -> float:
        """Estimates the chance, 0 to 1, that a draft token is accepted if those before it were.

        `prior` is the chance that is assumed before anything was counted. It weighs less the more was counted.
        """
        return (self.accepted + _PRIOR_WEIGHT * prior) / (self.accepted + self.rejected + _PRIOR_WEIGHT)

    def count(self, accepted: int, rejected: bool) -> None:
        """Adds one draft: `accepted` of its tokens were accepted, and `rejected` says whether the next one was rejected."""
        self.accepted = self.decay * self.accepted + accepted
        self.rejected = self.decay * self.rejected + rejected


Rates = tuple[AcceptanceRate, AcceptanceRate]  # for short and for long matches


def shared_rates() -> Rates:
    """Makes the rates of all sequences of a gateway. A new sequence's estimate starts from these rates."""
    return AcceptanceRate(_SHARED_DECAY), AcceptanceRate(_SHARED_DECAY)


@dataclass(slots=True)
class Drafter:
    """Drafts tokens for one sequence, and measures how many of them would be accepted.

    Compares drafts with the drawn tokens even if the drafts were not sent. So none has to be sent only to learn the rate.
    """

    lookup: PromptLookup
    shared: Rates = field(default_factory=shared_rates)
    disabled: bool = False  # a stage refused a row that had draft tokens: the sequence goes on without
    _own: Rates = field(default_factory=lambda: (AcceptanceRate(), AcceptanceRate()))
    _match: int = 0
    _draft: tuple[int, ...] = ()

    def draft(self, max_tokens: int) -> tuple[int, ...]:
        """Drafts at most `max_tokens` tokens after the newest one, and remembers them for `drawn`."""
        self._draft = ()
        if not self.disabled and max_tokens > 0:
            self._draft, self._match = self.lookup.draft(max_tokens)
        return self._draft

    @property
    def chance(self) -> float:
        """The estimated chance that a token of the last draft is accepted if those before it were."""
        own, shared = self._rates()
        return own.estimate(shared.estimate(0.5))

    def drawn(self, tokens: Items[int]) -> None:
        """Compares the last draft with the drawn `tokens`, then adds the drawn tokens to the searched text."""
        draft = self._draft[: len(tokens)]
        if draft:
            accepted = 0
            while accepted < len(draft) and draft[accepted] == tokens[accepted]:
                accepted += 1
            for rate in self._rates():
                rate.count(accepted, accepted < len(draft))
        self._draft = ()
        for token in tokens:
            self.lookup.add(token)

    def _rates(self) -> tuple[AcceptanceRate, AcceptanceRate]:
        """Returns the sequence's own and the shared acceptance rate for the match length of the last draft."""
        is_long = self._match >= _LONG_MATCH_TOKENS
        return self._own[is_long], self.shared[is_long]


def step_seconds(costs: Items[RowCosts], micro_batches: int, network_seconds: float) -> Callable[[int], float | None]:
    """Returns a function that estimates the pipeline's seconds per step from the number of tokens in a step.

    The function returns None if a stage has no measurements. With many micro-batches, the time is that of the slowest stage.
    With few, it is that of a whole round divided by their number. `costs` has one item per stage. `network_seconds` is the time
    of a whole round.
    """
    curves = [cost.points() for cost in costs]

    def seconds(tokens: int) -> float | None:
        stage_seconds = [each for points in curves if (each := seconds_on(points, tokens)) is not None]
        if len(stage_seconds) < len(curves):
            return None
        return max(*stage_seconds, (sum(stage_seconds) + network_seconds) / max(1, micro_batches))

    return seconds


def draft_lengths(drafts: Items[tuple[int, float]], seconds: Callable[[int], float | None]) -> list[int]:
    """Chooses how many draft tokens of each row to send, for the most expected tokens per second.

    `drafts` has per row the length of its draft and the chance that a token is accepted. `seconds` is a function that
    `step_seconds` returns. If it returns None, all lengths are 0.
    """
    lengths, best = [0] * len(drafts), [0] * len(drafts)
    rows, tokens = len(drafts), float(len(drafts))
    least = seconds(rows)
    if least is None:
        return best
    gains: list[tuple[float, int]] = []  # expected tokens of a row's next draft token, and the row
    for row, (length, chance) in enumerate(drafts):
        gain = 1.0
        for _ in range(length):
            gain *= chance
            if gain < _MIN_GAIN:
                break
            gains.append((gain, row))
    best_rate = tokens / least
    for gain, row in sorted(gains, key=lambda each: -each[0]):
        rows, tokens = rows + 1, tokens + gain
        lengths[row] += 1
        rate = tokens / (least + _MARGIN * ((seconds(rows) or least) - least))
        if rate > best_rate:
            best_rate, best = rate, list(lengths)
        elif rate < _STOP_SHARE * best_rate:
            break
    return best
