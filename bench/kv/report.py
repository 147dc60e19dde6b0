"""What `bench.kv` found, what was wanted of it, and the section of docs/benchmarks.md that says so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Final


class Case(StrEnum):
    SECOND_TURN = "second turn at 2,000 tokens, from memory: first token"
    SHARED_PROMPT = "32 at once, 1,000 tokens shared and 50 their own: all answered"
    LLAMA_CPP = "llama.cpp's server, its prompt cache: second turn, first token"


WANTED: Final = {Case.SECOND_TURN: 0.12, Case.SHARED_PROMPT: 0.3}
"""Seconds with what is held, by those without it: at most so much."""
MOST_COMPUTED: Final = round(1.2 * (1_000 + 32 * 50))
"""Prompt tokens of the shared prompt's case."""


@dataclass(frozen=True, slots=True)
class Found:
    """One try: the same question with what is held and without."""

    case: Case
    seconds: float
    plain_seconds: float
    different: int
    """Answers that are not those without."""
    computed_tokens: int | None = None
    """Of the prompts, where that is judged."""


Tries = Mapping[tuple[str, Case], Sequence[Found]]
"""By dtype and case."""


def met(tries: Sequence[Found]) -> bool | None:
    """None: nothing was wanted."""
    case = tries[0].case
    if case not in WANTED:
        return None
    few = all(one.computed_tokens is None or one.computed_tokens <= MOST_COMPUTED for one in tries)
    return few and ratio(tries) <= WANTED[case] and not any(one.different for one in tries)


def ratio(tries: Sequence[Found]) -> float:
    return median(one.seconds / one.plain_seconds for one in tries)


def markdown(found: Tries, facts: str) -> str:
    rows = [
        "| dtype | case | tries | held, s | computed, s | ratio | wanted | prompt tokens computed | other answers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (dtype, case), tries in found.items():
        held, plain = (median(getattr(one, name) for one in tries) for name in ("seconds", "plain_seconds"))
        computed = [one.computed_tokens for one in tries if one.computed_tokens is not None]
        judged = f"{max(computed)}, wanted at most {MOST_COMPUTED}" if computed else ""
        rows.append(
            f"| {dtype} | {case} | {len(tries)} | {held:.3f} | {plain:.3f} | {ratio(tries):.3f} | {WANTED.get(case, '')} "
            f"| {judged} | {sum(one.different for one in tries)} |"
        )
    return "\n".join(["## Keys and values that are held", "", facts, "", *rows])
