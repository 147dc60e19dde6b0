"""What `python -m bench.structured` found, as a section of docs/benchmarks.md."""

from collections.abc import Sequence
from typing import Final

from bench.structured.asking import Ended
from bench.structured.speed import Ratio

_WANTED: Final = 1.1


def markdown(answers: Sequence[Ended], kills: int, ratios: Sequence[Ratio], facts: str) -> str:
    ended = [answer for answer in answers if answer.finish_reason == "stop"]
    wrong = sum(not answer.fits for answer in answers)
    lines = [
        "## Structured output",
        "",
        facts,
        "",
        f"{len(answers)} random schemas, expressions, choices and grammars at temperature 1, {kills} kills of a stage "
        f"meanwhile: {len(ended)} answers ended by themselves, {wrong} of them not as asked; {len(answers) - len(ended)} ran "
        "into max_tokens.",
        "",
        f"| answers at once | ms per token, plain | with a grammar | ratio (wanted: at most {_WANTED}) |",
        "|---|---|---|---|",
        *(
            f"| {each.at_once} | {1000 * each.plain_seconds:.2f} | {1000 * each.grammar_seconds:.2f} | {each.ratio:.3f} |"
            for each in ratios
        ),
    ]
    return "\n".join(lines)
