"""What `bench.kv` found, what was wanted of it, and the section of docs/benchmarks.md that says so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Final


class Case(StrEnum):
    SECOND_TURN = "second turn at 2,000 tokens, from memory: first token"
    PEER = "second turn, from the pods that drain: first token"
    STORE = "second turn, from the store after zero, stages awake: first token"
    SHARED_PROMPT = "32 at once, 1,000 tokens shared and 50 their own: all answered"
    SCALED_IN = "a stage scaled in under running conversations of 2,000 tokens: the longest pause"
    FROM_ZERO = "10 conversations at once go on, gateways and stages at zero: last first token beyond a cold start's"
    LLAMA_CPP = "llama.cpp's server, its prompt cache: second turn, first token"


WANTED: Final = {
    Case.SECOND_TURN: 0.12,
    Case.PEER: 0.25,
    Case.STORE: 0.35,
    Case.SHARED_PROMPT: 0.3,
    Case.SCALED_IN: 0.3,
    Case.FROM_ZERO: 0.2,
}
"""Seconds with what is held, by those without it: at most so much."""
MOST_COMPUTED: Final = {
    Case.SHARED_PROMPT: round(1.2 * (1_000 + 32 * 50)),
    Case.SCALED_IN: 16 * 8,
}
"""Prompt tokens; where a stage is scaled in, what the pod that stays computed beyond the pieces of text that came: steps under
way, and tokens whose text came with the next one's. One conversation that is computed again has 2,000."""
LEAST_HELD: Final = 0.9  # of a prompt, where it was to be read from elsewhere


@dataclass(frozen=True, slots=True)
class Found:
    """One try: the same question with what is held and without."""

    case: Case
    seconds: float
    plain_seconds: float
    different: int  # answers that are not those without
    computed_tokens: int | None = None  # where that is judged
    start_seconds: float = 0.0  # of a cold start, of which `seconds` has one more than `plain_seconds`
    held: float | None = None  # share of the prompt that was not computed, the least of all, where that is judged


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """why: and what to do."""

    case: Case
    why: str


Tries = Mapping[tuple[str, Case], Sequence[Found]]  # by dtype and case
Missing = Mapping[str, Sequence[NotMeasured]]  # by dtype


def met(tries: Sequence[Found]) -> bool | None:
    """None: nothing was wanted."""
    case = tries[0].case
    if case not in WANTED:
        return None
    few = all(one.computed_tokens is None or one.computed_tokens <= MOST_COMPUTED[case] for one in tries)
    held = all(one.held is None or one.held >= LEAST_HELD for one in tries)
    return few and held and ratio(tries) <= WANTED[case] and not any(one.different for one in tries)


def ratio(tries: Sequence[Found]) -> float:
    return median(max(0.0, one.seconds - one.start_seconds) / one.plain_seconds for one in tries)


def verdicts(found: Tries, missing: Missing) -> list[str]:
    """A line for each case."""
    words = {True: "met", False: "missed", None: "told"}
    said = [f"{words[met(tries)]}: {dtype}: {case}: {ratio(tries):.3f}{_why(tries)}" for (dtype, case), tries in found.items()]
    return said + [f"not measured: {dtype}: {one.case}: {one.why}" for dtype, those in missing.items() for one in those]


def _why(tries: Sequence[Found]) -> str:
    """Where the ratio alone does not say it."""
    held = [one.held for one in tries if one.held is not None]
    if held and min(held) < LEAST_HELD:
        return f"; only {min(held):.0%} of a prompt was held: logs of the stages name what failed, a busy machine computes"
    computed = max((one.computed_tokens or 0 for one in tries), default=0)
    if computed > MOST_COMPUTED.get(tries[0].case, computed):
        return f"; {computed} tokens were computed, {MOST_COMPUTED[tries[0].case]} at most were wanted"
    different = sum(one.different for one in tries)
    return f"; {different} answers are not those without" if different else ""


def markdown(found: Tries, missing: Missing, facts: str) -> str:
    rows = [
        "| dtype | case | tries | held, s | computed, s | ratio | wanted | verdict | tokens computed | other answers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    words = {True: "met", False: "missed", None: ""}
    for (dtype, case), tries in found.items():
        held, plain = (median(getattr(one, name) for one in tries) for name in ("seconds", "plain_seconds"))
        start = median(one.start_seconds for one in tries)
        beyond = f" (a cold start {start:.3f})" if start else ""
        computed = [one.computed_tokens for one in tries if one.computed_tokens is not None]
        judged = f"{max(computed)}, wanted at most {MOST_COMPUTED[case]}" if computed else ""
        rows.append(
            f"| {dtype} | {case} | {len(tries)} | {held:.3f}{beyond} | {plain:.3f} | {ratio(tries):.3f} "
            f"| {WANTED.get(case, '')} | {words[met(tries)]} | {judged} | {sum(one.different for one in tries)} |"
        )
    for dtype, those in missing.items():
        rows += [f"| {dtype} | {one.case} | 0 | | | | {WANTED[one.case]} | not measured: {one.why} | | |" for one in those]
    return "\n".join(["## Keys and values that are held", "", facts, "", *rows])
