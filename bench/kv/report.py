"""The findings of `bench.kv`, their targets, and the section of docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Final

from bench.report import table


class Case(StrEnum):
    SECOND_TURN = "second turn at 2,000 tokens, from memory: first token"
    PEER = "second turn, from the pods that drain: first token"
    STORE = "second turn, from the store after zero, stages awake: first token"
    SHARED_PROMPT = "32 at once, 1,000 tokens shared and 50 their own: all answered"
    SCALED_IN = "a stage scaled in under running conversations of 2,000 tokens: the longest pause"
    FROM_ZERO = "10 conversations at once go on, gateways and stages at zero: last first token beyond a cold start's"
    LLAMA_CPP = "llama.cpp's server, its prompt cache: second turn, first token"


# Upper bounds of the time with cached keys and values, divided by the time without.
WANTED: Final = {
    Case.SECOND_TURN: 0.12,
    Case.PEER: 0.25,
    Case.STORE: 0.35,
    Case.SHARED_PROMPT: 0.3,
    Case.SCALED_IN: 0.3,
    Case.FROM_ZERO: 0.2,
}
# Upper bounds of computed prompt tokens. When a stage is scaled in, the pod that stays may compute a few tokens beyond the
# pieces of text that came: steps under way, and tokens whose text came with the next one's. A whole conversation has 2,000.
MOST_COMPUTED: Final = {
    Case.SHARED_PROMPT: round(1.2 * (1_000 + 32 * 50)),
    Case.SCALED_IN: 16 * 8,
}
LEAST_HELD: Final = 0.9  # share of a prompt that must come from another pod or the store
_WORDS: Final = {True: "met", False: "missed", None: ""}


@dataclass(frozen=True, slots=True)
class Found:
    """One try: the same question with cached keys and values and without."""

    case: Case
    seconds: float
    plain_seconds: float
    different: int  # answers that differ from those without a cache
    computed_tokens: int | None = None  # None: not judged
    start_seconds: float = 0.0  # of a cold start, which `seconds` contains and `plain_seconds` does not
    held: float | None = None  # smallest share of a prompt that was not computed; None: not judged


@dataclass(frozen=True, slots=True)
class NotMeasured:
    case: Case
    why: str


Tries = Mapping[tuple[str, Case], Sequence[Found]]  # by dtype and case
Missing = Mapping[str, Sequence[NotMeasured]]  # by dtype


def met(tries: Sequence[Found]) -> bool | None:
    """None: the case has no target."""
    case = tries[0].case
    if case not in WANTED:
        return None
    few = all(each.computed_tokens is None or each.computed_tokens <= MOST_COMPUTED[case] for each in tries)
    held = all(each.held is None or each.held >= LEAST_HELD for each in tries)
    return few and held and ratio(tries) <= WANTED[case] and not any(each.different for each in tries)


def ratio(tries: Sequence[Found]) -> float:
    return median(max(0.0, each.seconds - each.start_seconds) / each.plain_seconds for each in tries)


def verdicts(found: Tries, missing: Missing) -> list[str]:
    """A line for each case."""
    lines = [
        f"{_WORDS[met(tries)] or 'told'}: {dtype}: {case}: {ratio(tries):.3f}{_reason(tries)}"
        for (dtype, case), tries in found.items()
    ]
    return lines + [f"not measured: {dtype}: {each.case}: {each.why}" for dtype, those in missing.items() for each in those]


def _reason(tries: Sequence[Found]) -> str:
    """The cause of a miss that the ratio does not show."""
    held = [each.held for each in tries if each.held is not None]
    if held and min(held) < LEAST_HELD:
        return f"; only {min(held):.0%} of a prompt was held: logs of the stages name what failed, a busy machine computes"
    computed = max((each.computed_tokens or 0 for each in tries), default=0)
    if computed > MOST_COMPUTED.get(tries[0].case, computed):
        return f"; {computed} tokens were computed, {MOST_COMPUTED[tries[0].case]} at most were wanted"
    different = sum(each.different for each in tries)
    return f"; {different} answers are not those without" if different else ""


def markdown(found: Tries, missing: Missing, facts: str) -> str:
    rows: list[Sequence[object]] = []
    for (dtype, case), tries in found.items():
        held, plain = (median(getattr(each, name) for each in tries) for name in ("seconds", "plain_seconds"))
        start = median(each.start_seconds for each in tries)
        computed = [each.computed_tokens for each in tries if each.computed_tokens is not None]
        rows.append(
            [
                dtype,
                case,
                len(tries),
                f"{held:.3f}" + (f" (a cold start {start:.3f})" if start else ""),
                f"{plain:.3f}",
                f"{ratio(tries):.3f}",
                WANTED.get(case, ""),
                _WORDS[met(tries)],
                f"{max(computed)}, wanted at most {MOST_COMPUTED[case]}" if computed else "",
                sum(each.different for each in tries),
            ]
        )
    for dtype, those in missing.items():
        rows += [[dtype, each.case, 0, "", "", "", WANTED[each.case], f"not measured: {each.why}", "", ""] for each in those]
    columns = [
        "dtype",
        "case",
        "tries",
        "held, s",
        "computed, s",
        "ratio",
        "wanted",
        "verdict",
        "tokens computed",
        "other answers",
    ]
    return f"## Keys and values that are held\n\n{facts}\n\n{table(columns, rows)}"
