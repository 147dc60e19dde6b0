"""What a load run must show, judged from its records, and the section of the documentation that says so."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, TypeGuard

from bench.load.series import (
    Answer,
    Failure,
    Phase,
    Record,
    Replicas,
    Second,
    idle_seconds,
    percentile,
    phases,
    replica_seconds,
)

SETTLED_SECONDS: Final = 30.0
"""After a rise: from then on throughput counts."""
LEAST_SHARE: Final = 0.7
MOST_COST: Final = 0.5


@dataclass(frozen=True, slots=True)
class Setting:
    """What the pipeline was."""

    stages: tuple[str, ...]
    """Names of the stages' Services, in order."""
    sleep_seconds: tuple[float, ...] | None
    """Of a pass, per stage; None: real layers."""
    micro_batch_sequences: int

    def could_do(self, replicas: Sequence[float], conversations: int) -> float:
        """Most tokens per second: of the narrowest stage with full micro-batches, or of so many that never wait."""
        seconds = self.sleep_seconds or ()
        widths = (count * self.micro_batch_sequences / each for count, each in zip(replicas, seconds, strict=True))
        return min(conversations / sum(seconds), *widths)


@dataclass(frozen=True, slots=True)
class Verdict:
    what: str
    seen: str
    holds: bool


@dataclass(frozen=True, slots=True)
class PhaseFigures:
    """One phase of the plan; rates and replicas are means from `SETTLED_SECONDS` on (of a short phase: its second half)."""

    conversations: int
    seconds: float
    replicas: tuple[float, ...]
    """Ready, per stage."""
    tokens_per_second: float
    could_do: float | None
    """None for real layers, and where answers of the phase before still run."""
    first_token_p50: float
    first_token_p95: float
    answers: int
    failed: int
    rises: bool


def phase_figures(setting: Setting, records: Sequence[Record]) -> list[PhaseFigures]:
    figures, before = [], 0
    for phase, end in phases(records):
        figures.append(_figures(setting, records, phase, end, rises=phase.conversations > before))
        before = phase.conversations
    return figures


def _figures(setting: Setting, records: Sequence[Record], phase: Phase, end: float, *, rises: bool) -> PhaseFigures:
    within = [record for record in records if phase.t <= record.t < end]
    settled_at = phase.t + min(SETTLED_SECONDS, (end - phase.t) / 2)
    settled = [record for record in within if record.t >= settled_at]
    replicas = tuple(_ready(settled, stage) for stage in setting.stages)
    first = [record.time_to_first_token_seconds for record in within if isinstance(record, Answer)]
    tokens = [record.tokens for record in settled if isinstance(record, Second)]
    return PhaseFigures(
        conversations=phase.conversations,
        seconds=end - phase.t,
        replicas=replicas,
        tokens_per_second=fmean(tokens) if tokens else 0.0,
        could_do=setting.could_do(replicas, phase.conversations) if setting.sleep_seconds and rises else None,
        first_token_p50=percentile(first, 0.5),
        first_token_p95=percentile(first, 0.95),
        answers=len(first),
        failed=sum(map(_is_request, within)),
        rises=rises,
    )


def _is_request(record: Record) -> TypeGuard[Failure]:
    """A question that failed, not a reading of the metrics."""
    return isinstance(record, Failure) and record.conversation >= 0


def _ready(records: Sequence[Record], service: str) -> float:
    found = [record.ready for record in records if isinstance(record, Replicas) and record.service == service]
    return fmean(found) if found else 0.0


def judge(setting: Setting, records: Sequence[Record]) -> list[Verdict]:
    """What must show. Of real layers on a machine that cannot multiply them: only that nothing failed."""
    failures = [record for record in records if _is_request(record)]
    answers = sum(isinstance(record, Answer) for record in records)
    seen = f"{len(failures)} of {answers + len(failures)}" + (f"; first: {failures[0].reason}" if failures else "")
    verdicts = [Verdict("no request failed", seen, bool(answers) and not failures)]
    if setting.sleep_seconds:
        verdicts += [_at_zero(records), _only_the_slow_stage(setting, records)]
        verdicts += [_throughput(each) for each in phase_figures(setting, records) if each.rises]
        verdicts.append(_cost(records))
    return verdicts


def _at_zero(records: Sequence[Record]) -> Verdict:
    last = {record.service: record for record in records if isinstance(record, Replicas)}
    held = {service: record.held for service, record in last.items() if record.held}
    since = max((record.t for record in records if isinstance(record, Replicas) and record.held), default=0.0)
    left = max((phase.t for phase, _ in phases(records) if phase.conversations == 0), default=0.0)
    return Verdict(
        "all at zero at the end",
        f"{held} left" if held else f"{since - left:.0f} s after the last fall",
        bool(last) and not held,
    )


def _only_the_slow_stage(setting: Setting, records: Sequence[Record]) -> Verdict:
    peaks = [_peak(records, stage) for stage in setting.stages]
    seconds = setting.sleep_seconds or ()
    slow = max(range(len(peaks)), key=lambda stage: seconds[stage])
    holds = peaks[slow] > 1 and all(peak <= 1 for stage, peak in enumerate(peaks) if stage != slow)
    return Verdict("the slow stage, and not its neighbours, gains replicas", f"at most {_slashed(peaks)}", holds)


def _peak(records: Sequence[Record], service: str) -> float:
    return max(
        (each.ready + each.starting for each in records if isinstance(each, Replicas) and each.service == service), default=0
    )


def _throughput(phase: PhaseFigures) -> Verdict:
    share = phase.tokens_per_second / phase.could_do if phase.could_do else 0.0
    return Verdict(
        f"{phase.conversations} conversations: {SETTLED_SECONDS:.0f} s after the rise at the latest, throughput is at least "
        f"{LEAST_SHARE} × what the replicas could do",
        f"{share:.2f}",
        share >= LEAST_SHARE,
    )


def _cost(records: Sequence[Record]) -> Verdict:
    cost = replica_seconds(records).values()
    held, static = sum(each for each, _ in cost), sum(peak for _, peak in cost)
    share = held / static if static else 1.0
    return Verdict(
        f"replica-seconds are at most {MOST_COST:.0%} of a static deployment's for the peak",
        f"{held:.0f} of {static:.0f}: {share:.0%}; {idle_seconds(records):.0f} s of the run at zero",
        share <= MOST_COST,
    )


def markdown(setting: Setting, records: Sequence[Record]) -> str:
    """Tables: what must show, the phases, the cost of each Service."""
    lines = ["| must show | seen | |", "|---|---|---|"]
    lines += [f"| {each.what} | {each.seen} | {'yes' if each.holds else '**no**'} |" for each in judge(setting, records)]
    lines += [
        "",
        "| conversations | seconds | replicas | tokens/s | could do | time to first token p50 | p95 | answers | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_phase_row(each) for each in phase_figures(setting, records)]
    lines += ["", "| Service | replica-seconds | static, for the peak | share |", "|---|---|---|---|"]
    cost = replica_seconds(records)
    total = sum(held for held, _ in cost.values()), sum(peak for _, peak in cost.values())
    lines += [
        f"| {name} | {held:.0f} | {peak:.0f} | {_share(held, peak)} |" for name, (held, peak) in (*cost.items(), ("all", total))
    ]
    return "\n".join(lines)


def _phase_row(phase: PhaseFigures) -> str:
    could = "" if phase.could_do is None else f"{phase.could_do:.0f}"
    first = (f"{phase.first_token_p50:.2f} s", f"{phase.first_token_p95:.2f} s") if phase.answers else ("", "")
    return (
        f"| {phase.conversations} | {phase.seconds:.0f} | {_slashed(phase.replicas)} | {phase.tokens_per_second:.0f} | {could} "
        f"| {first[0]} | {first[1]} | {phase.answers} | {phase.failed} |"
    )


def _slashed(numbers: Sequence[float]) -> str:
    return "/".join(f"{number:.1f}".removesuffix(".0") for number in numbers)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else ""
