"""How many tokens are guessed for each row of a step: as many as make more tokens a second out of what rows cost there.

A guess that comes true saves its sequence a round; one that does not has cost a row. How likely it is comes from what became of
the sequence's guesses so far, and of others' where it has few, what a row costs from the stages' steps so far (`row_costs`).
Right answers do not depend on any of it: the last stage draws each token as it would have without guesses, and what did not
come true is taken back.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Final

from functions.gateway.scheduling.lookup import Lookup
from functions.gateway.scheduling.row_costs import RowCosts, seconds_on

_LONG_MATCH_TOKENS: Final = 4
"""From here on a match is taken for a quotation, and has chances of its own."""
_FORGETS: Final = 0.9
_FORGETS_OF_ALL: Final = 0.99
"""Shares of what was counted that still count one round later: of one sequence, and of all."""
_PRIOR: Final = 2.0
"""What all sequences' experience counts for beside a sequence's own, in guesses."""
_WORSE: Final = 0.8
"""Fewer tokens a second than this share of the best so far: more guesses will not be better."""
_MARGIN: Final = 1.25
"""How many times what it is measured to cost a guess must be worth: both are estimates, and those
that look well often do by their errors."""
_LEAST_GAIN: Final = 1 / 256
"""Tokens: a guess that is worth less is not weighed."""


@dataclass(slots=True)
class Chances:
    """How often guesses come true."""

    forgets: float = _FORGETS
    agreed: float = 0.0
    missed: float = 0.0

    def of_one(self, prior: float) -> float:
        return (self.agreed + _PRIOR * prior) / (self.agreed + self.missed + _PRIOR)

    def came(self, agreed: int, missed: bool) -> None:
        self.agreed = self.forgets * self.agreed + agreed
        self.missed = self.forgets * self.missed + missed


@dataclass(slots=True)
class Experience:
    """Of all sequences of a gateway, which a new one begins with: by whether the match was long. At first, every other one."""

    short: Chances = field(default_factory=lambda: Chances(_FORGETS_OF_ALL))
    long: Chances = field(default_factory=lambda: Chances(_FORGETS_OF_ALL))

    def guesser(self, token_ids: Items[int], predicted_ids: Items[int]) -> "Guesser":
        """Of a new sequence: its prompt, and the text that its client expects."""
        return Guesser(Lookup(token_ids, predicted_ids), self)


@dataclass(slots=True)
class Guesser:
    """Of one sequence. What comes tells of guesses that were not sent, too, so that none have to be sent only to learn."""

    lookup: Lookup
    experience: Experience = field(default_factory=Experience)
    _short: Chances = field(default_factory=Chances)
    _long: Chances = field(default_factory=Chances)
    _match: int = 0
    _guesses: tuple[int, ...] = ()
    given_up: bool = False
    """A stage refused a row that had guesses: it goes on without."""

    def guess(self, most_tokens: int) -> tuple[int, ...]:
        self._guesses = ()
        if self.given_up or most_tokens < 1:
            return ()
        self._guesses, self._match = self.lookup.guess(most_tokens)
        return self._guesses

    @property
    def chance(self) -> float:
        """Of each token of the last guess, given that those before it came true."""
        own, others = self._chances()
        return own.of_one(others.of_one(0.5))

    def came(self, tokens: Items[int]) -> None:
        """`tokens` were drawn behind those that `guess` saw."""
        known = self._guesses[: len(tokens)]
        if known:
            agreed = next(
                (place for place, (guess, token) in enumerate(zip(known, tokens, strict=False)) if guess != token), len(known)
            )
            for chances in self._chances():
                chances.came(agreed, agreed < len(known))
        self._guesses = ()
        for token in tokens:
            self.lookup.add(token)

    def _chances(self) -> tuple[Chances, Chances]:
        """Its own, and those of all."""
        if self._match >= _LONG_MATCH_TOKENS:
            return self._long, self.experience.long
        return self._short, self.experience.short


def step_seconds(costs: Items[RowCosts], micro_batches: int, network_seconds: float) -> Callable[[int], float | None]:
    """What a step of n tokens costs a micro-batch where so many are under way: the narrowest stage's seconds, or its part of a
    round, its network included, where there are too few to keep that stage busy."""

    curves = [cost.points() for cost in costs]

    def seconds(tokens: int) -> float | None:
        of_stages = [seconds_on(points, tokens) for points in curves]
        known = [each for each in of_stages if each is not None]
        if len(known) < len(of_stages):
            return None
        return max(*known, (sum(known) + network_seconds) / max(1, micro_batches))

    return seconds


def how_many(candidates: Items[tuple[int, float]], seconds: Callable[[int], float | None]) -> list[int]:
    """Per row, how many of its guesses are sent.

    candidates: per row, how many there are, and the chance of each. seconds: of a step with n tokens; None: not known.
    """
    chosen, best = [0] * len(candidates), [0] * len(candidates)
    tokens, rows = float(len(candidates)), len(candidates)
    least = seconds(rows)
    if least is None:
        return best
    rate = most = tokens / least
    for gain, row in _gains(candidates):
        rows, tokens = rows + 1, tokens + gain
        chosen[row] += 1
        rate = tokens / (least + _MARGIN * ((seconds(rows) or least) - least))
        if rate > most:
            most, best = rate, list(chosen)
        elif rate < _WORSE * most:
            break
    return best


def _gains(candidates: Items[tuple[int, float]]) -> Iterator[tuple[float, int]]:
    """What the next guess of a row is worth in tokens, and the row; the most valuable first."""
    gains: list[tuple[float, int]] = []
    for row, (count, chance) in enumerate(candidates):
        gain = 1.0
        for _ in range(count):
            gain *= chance
            if gain < _LEAST_GAIN:
                break
            gains.append((gain, row))
    return iter(sorted(gains, key=lambda gain: -gain[0]))
