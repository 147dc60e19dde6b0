"""The findings of `bench.speculation`, their targets, and the section of docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from bench.report import Verdict, judged, table
from bench.speculation.answers import Answered

KEPT: Final = 0.85  # share of the throughput of many at once that a slow network should leave


@dataclass(frozen=True, order=True, slots=True)
class Setting:
    """A set of questions and the way it is asked."""

    dtype: str
    questions: str  # quoting or free
    at_once: int
    delay_seconds: float  # each way on every hop between gateway and stages


@dataclass(frozen=True, slots=True)
class Pair:
    """Turns of the same questions with and without draft tokens, taken one after the other."""

    with_draft_tokens: Sequence[Answered]
    without: Sequence[Answered]

    @property
    def ratio(self) -> float:
        """Tokens a second with draft tokens, divided by those without: the median of the turns."""
        return median(self.ratios)

    @property
    def ratios(self) -> list[float]:
        """The ratio of each turn."""
        pairs = zip(self.with_draft_tokens, self.without, strict=True)
        return [one.tokens_per_second / other.tokens_per_second for one, other in pairs]

    @property
    def cpu_ratio(self) -> float:
        """The same for tokens per second of CPU time, which other work on the machine disturbs less."""
        pairs = zip(self.with_draft_tokens, self.without, strict=True)
        return median(one.tokens_per_cpu_second / (other.tokens_per_cpu_second or 1.0) for one, other in pairs)

    @property
    def different(self) -> int:
        """Answers that differ from those without draft tokens."""
        wanted = self.without[0].texts
        return sum(
            text != own
            for turn in (*self.with_draft_tokens, *self.without)
            for text, own in zip(wanted, turn.texts, strict=True)
        )


def wanted(setting: Setting) -> float:
    """The ratio that a setting should reach."""
    if setting.questions == "quoting" and setting.at_once == 1:
        return 2.0 if setting.delay_seconds else 1.8
    return 0.97


def verdicts(found: Mapping[Setting, Pair]) -> list[Verdict]:
    told = []
    for setting, pair in found.items():
        seen = f"{pair.ratio:.2f} ({min(pair.ratios):.2f} to {max(pair.ratios):.2f}; by CPU {pair.cpu_ratio:.2f})"
        met = pair.ratio >= wanted(setting) and not pair.different
        told.append(Verdict(str(setting), f"{seen}, {pair.different} other answers", met, f"≥ {wanted(setting):g}"))
    for setting, share in _kept_throughput(found).items():
        told.append(judged(f"{setting}: of the throughput without delay", share, KEPT))
    return told


def markdown(found: Mapping[Setting, Pair], facts: str) -> str:
    columns = [
        "dtype", "questions", "at once", "delay each way", "turns", "plain tokens/s", "with drafts", "ratio (of the turns)",
        "by CPU", "wanted", "accepted", "other answers",
    ]  # fmt: skip
    rows = []
    for setting, pair in found.items():
        accepted, rejected = (sum(getattr(turn, name) for turn in pair.with_draft_tokens) for name in ("accepted", "rejected"))
        rows.append(
            [
                setting.dtype,
                setting.questions,
                setting.at_once,
                f"{setting.delay_seconds * 1000:g} ms",
                len(pair.ratios),
                f"{_rate(pair.without):.1f}",
                f"{_rate(pair.with_draft_tokens):.1f}",
                f"{pair.ratio:.2f} ({min(pair.ratios):.2f}–{max(pair.ratios):.2f})",
                f"{pair.cpu_ratio:.2f}",
                f"{wanted(setting):g}",
                f"{accepted} of {accepted + rejected} ({accepted / max(1, accepted + rejected):.0%})",
                pair.different,
            ]
        )
    kept = [
        f"{setting.dtype}, {setting.questions}, {setting.at_once} at once: {setting.delay_seconds * 1000:g} ms each way leave "
        f"{share:.2f} of the throughput without them (wanted: {KEPT:g}).\n"
        for setting, share in _kept_throughput(found).items()
    ]
    return "\n".join(["## Several tokens a round", "", facts, "", table(columns, rows), "", *kept])


def _kept_throughput(found: Mapping[Setting, Pair]) -> dict[Setting, float]:
    """The share of the throughput of many at once, with draft tokens, that a slow network leaves."""
    return {
        setting: _rate(found[setting].with_draft_tokens) / _rate(found[near].with_draft_tokens)
        for setting in found
        if setting.delay_seconds and setting.at_once > 1 and (near := replace(setting, delay_seconds=0.0)) in found
    }


def _rate(turns: Sequence[Answered]) -> float:
    return median(turn.tokens_per_second for turn in turns)
