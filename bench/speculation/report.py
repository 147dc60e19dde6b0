"""The section of docs/benchmarks.md that `bench.speculation` writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from bench.speculation.answers import Answered

KEPT: Final = 0.85  # share of the throughput of many at once that a network is to leave


@dataclass(frozen=True, order=True, slots=True)
class Setting:
    """What was asked, and how."""

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
        """Tokens a second with draft tokens, by those without: the median of the turns."""
        return median(self.ratios)

    @property
    def ratios(self) -> list[float]:
        """Of each turn."""
        return [one.tokens_per_second / other.tokens_per_second for one, other in zip(*self._sides(), strict=True)]

    @property
    def cpu_ratio(self) -> float:
        """Tokens for a second of the processors, which other work on the machine moves less; the median of the turns."""
        pairs = zip(*self._sides(), strict=True)
        return median(one.tokens_per_cpu_second / (other.tokens_per_cpu_second or 1.0) for one, other in pairs)

    @property
    def different(self) -> int:
        """Answers that are not those without draft tokens."""
        wanted = self.without[0].texts
        return sum(
            text != own
            for turn in (*self.with_draft_tokens, *self.without)
            for text, own in zip(wanted, turn.texts, strict=True)
        )

    def _sides(self) -> tuple[Sequence[Answered], Sequence[Answered]]:
        return self.with_draft_tokens, self.without


def wanted(setting: Setting) -> float:
    """The ratio that a setting is to reach."""
    if setting.questions == "quoting" and setting.at_once == 1:
        return 2.0 if setting.delay_seconds else 1.8
    return 0.97


def markdown(found: Mapping[Setting, Pair], facts: str) -> str:
    rows = [
        "| dtype | questions | at once | delay each way | turns | plain tokens/s | speculating | ratio (of the turns) | by CPU "
        "| wanted | came true | others |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setting, pair in found.items():
        without = median(turn.tokens_per_second for turn in pair.without)
        speculating = median(turn.tokens_per_second for turn in pair.with_draft_tokens)
        accepted, rejected = (sum(getattr(turn, name) for turn in pair.with_draft_tokens) for name in ("accepted", "rejected"))
        share = accepted / max(1, accepted + rejected)
        rows.append(
            f"| {setting.dtype} | {setting.questions} | {setting.at_once} | {setting.delay_seconds * 1000:g} ms "
            f"| {len(pair.ratios)} | {without:.1f} | {speculating:.1f} "
            f"| {pair.ratio:.2f} ({min(pair.ratios):.2f}–{max(pair.ratios):.2f}) | {pair.cpu_ratio:.2f} | {wanted(setting):g} "
            f"| {accepted} of {accepted + rejected} ({share:.0%}) | {pair.different} |"
        )
    kept = [
        f"{setting.dtype}, {setting.questions}, {setting.at_once} at once: {setting.delay_seconds * 1000:g} ms each way leave "
        f"{share:.2f} of the throughput without them (wanted: {KEPT:g}).\n"
        for setting, share in kept_throughput(found).items()
    ]
    return "\n".join(["## Several tokens a round", "", facts, "", *rows, "", *kept])


def kept_throughput(found: Mapping[Setting, Pair]) -> dict[Setting, float]:
    """How much throughput a network leaves of many at once, draft tokens on."""
    return {
        setting: _rate(found[setting]) / _rate(found[near])
        for setting in found
        if setting.delay_seconds and setting.at_once > 1 and (near := replace(setting, delay_seconds=0.0)) in found
    }


def _rate(pair: Pair) -> float:
    return median(turn.tokens_per_second for turn in pair.with_draft_tokens)
