"""How many tokens are guessed for each row of a step: as many as make more tokens a second out of what rows cost there.

A guess that comes true saves its sequence a round; one that does not has cost a row. How likely it is comes from what became of
the sequence's guesses so far, what a row costs from the stages' steps so far (`row_costs`). Right answers do not depend on any
of it: the last stage draws each token as it would have without guesses, and what did not come true is taken back.
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
"""Share of what was counted that still counts one round later."""
_WORSE: Final = 0.8
"""Fewer tokens a second than this share of the best so far: more guesses will not be better."""


@dataclass(slots=True)
class Chances:
    """How often guesses of one sequence come true. Until something is known, every other one."""

    agreed: float = 1.0
    missed: float = 1.0

    @property
    def of_one(self) -> float:
        return self.agreed / (self.agreed + self.missed)

    def came(self, guessed: int, agreed: int) -> None:
        self.agreed = 1e-3 + _FORGETS * self.agreed + agreed
        self.missed = 1e-3 + _FORGETS * self.missed + (agreed < guessed)


@dataclass(slots=True)
class Guesser:
    """Of one sequence."""

    lookup: Lookup
    _short: Chances = field(default_factory=Chances)
    _long: Chances = field(default_factory=Chances)
    _match: int = 0
    given_up: bool = False
    """A stage refused a row that had guesses: it goes on without."""

    def guess(self, most_tokens: int) -> tuple[int, ...]:
        if self.given_up or most_tokens < 1:
            return ()
        guesses, self._match = self.lookup.guess(most_tokens)
        return guesses

    @property
    def chance(self) -> float:
        """Of each token of the last guess, given that those before it came true."""
        return self._chances().of_one

    def came(self, guessed: int, tokens: Items[int]) -> None:
        """`tokens` were drawn: those guesses that came true, and one more."""
        if guessed:
            self._chances().came(guessed, len(tokens) - 1)
        for token in tokens:
            self.lookup.add(token)

    def _chances(self) -> Chances:
        return self._long if self._match >= _LONG_MATCH_TOKENS else self._short


def step_seconds(costs: Items[RowCosts], micro_batches: int) -> Callable[[int], float | None]:
    """What a step of n tokens costs a micro-batch where so many are under way: the narrowest stage's seconds, or its part of a
    round where there are too few to keep that stage busy."""

    curves = [cost.points() for cost in costs]

    def seconds(tokens: int) -> float | None:
        of_stages = [seconds_on(points, tokens) for points in curves]
        known = [each for each in of_stages if each is not None]
        return max(*known, sum(known) / max(1, micro_batches)) if len(known) == len(of_stages) else None

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
        rate = tokens / (seconds(rows) or least)
        if rate > most:
            most, best = rate, list(chosen)
        elif rate < _WORSE * most:
            break
    return best


def _gains(candidates: Items[tuple[int, float]]) -> Iterator[tuple[float, int]]:
    """What the next guess of a row is worth in tokens, and the row; the most valuable first."""
    gains = [(chance ** (place + 1), row) for row, (count, chance) in enumerate(candidates) for place in range(count)]
    return iter(sorted(gains, key=lambda gain: -gain[0]))
