"""How many tokens are drafted for each row of a step: as many as make more tokens a second out of what rows cost there.

An accepted draft token saves its sequence a round; a rejected one has cost a row. The chance of acceptance comes from the
sequence's draft tokens so far, and from those of others if it has few; the cost of a row from the steps so far (`row_costs`).
Answers do not depend on any of it: the last stage draws each token as it would without draft tokens, and rejected ones are
taken back.
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
"""What all sequences' experience counts for beside a sequence's own, in draft tokens."""
_WORSE: Final = 0.8
"""Fewer tokens a second than this share of the best so far: more draft tokens will not be better."""
_MARGIN: Final = 1.25
"""How many times what it is measured to cost a draft token must be worth: both are estimates, and those
that look well often do by their errors."""
_LEAST_GAIN: Final = 1 / 256
"""Tokens: a draft token that is worth less is not weighed."""


@dataclass(slots=True)
class Chances:
    """How often draft tokens come true."""

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

    def drafter(self, token_ids: Items[int], predicted_ids: Items[int]) -> "Drafter":
        """Of a new sequence: its prompt, and the text that its client expects."""
        return Drafter(Lookup(token_ids, predicted_ids), self)


@dataclass(slots=True)
class Drafter:
    """Of one sequence. What comes tells of draft tokens that were not sent, too, so that none have to be sent only to learn."""

    lookup: Lookup
    experience: Experience = field(default_factory=Experience)
    _short: Chances = field(default_factory=Chances)
    _long: Chances = field(default_factory=Chances)
    _match: int = 0
    _draft_tokens: tuple[int, ...] = ()
    given_up: bool = False
    """A stage refused a row that had draft tokens: it goes on without."""

    def draft(self, most_tokens: int) -> tuple[int, ...]:
        self._draft_tokens = ()
        if self.given_up or most_tokens < 1:
            return ()
        self._draft_tokens, self._match = self.lookup.draft(most_tokens)
        return self._draft_tokens

    @property
    def chance(self) -> float:
        """Chance of each token of the last draft, given that those before it came true."""
        own, others = self._chances()
        return own.of_one(others.of_one(0.5))

    def came(self, tokens: Items[int]) -> None:
        """`tokens` were drawn behind those that `draft` saw."""
        known = self._draft_tokens[: len(tokens)]
        if known:
            agreed = next(
                (place for place, (draft, token) in enumerate(zip(known, tokens, strict=False)) if draft != token), len(known)
            )
            for chances in self._chances():
                chances.came(agreed, agreed < len(known))
        self._draft_tokens = ()
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
    """Per row, how many of its draft tokens are sent.

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
    """What the next draft token of a row is worth in tokens, and the row; the most valuable first."""
    gains: list[tuple[float, int]] = []
    for row, (count, chance) in enumerate(candidates):
        gain = 1.0
        for _ in range(count):
            gain *= chance
            if gain < _LEAST_GAIN:
                break
            gains.append((gain, row))
    return iter(sorted(gains, key=lambda gain: -gain[0]))
