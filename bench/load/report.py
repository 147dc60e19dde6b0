"""Judges a load run from its records, and writes the tables of its section in docs/benchmarks.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from matplotlib.figure import Figure

from bench.load.series import Answer, Failure, Phase, Replicas, Second, idle_seconds, percentile, phases, replica_seconds
from bench.records import Record, of
from bench.report import Verdict, judged, table, verdict_table

SETTLED_SECONDS: Final = 30.0  # after a rise; from then on throughput counts
LEAST_SHARE: Final = 0.7
MOST_COST: Final = 0.5
_WINDOW_SECONDS: Final = 10.0  # of times to the first token in the picture


@dataclass(frozen=True, slots=True)
class Setting:
    """The measured pipeline."""

    stages: tuple[str, ...]  # names of the stages' Services, in order
    sleep_seconds: tuple[float, ...]  # of a pass, per stage
    micro_batch_sequences: int

    def possible_rate(self, replicas: Sequence[float], conversations: int) -> float:
        """Tokens per second at best: of the narrowest stage with full micro-batches, or of conversations that never wait."""
        timed = zip(replicas, self.sleep_seconds, strict=True)
        widths = (count * self.micro_batch_sequences / seconds for count, seconds in timed)
        return min(conversations / sum(self.sleep_seconds), *widths)


@dataclass(frozen=True, slots=True)
class PhaseFigures:
    """One phase of the plan; rates and replicas are means from `SETTLED_SECONDS` on (of a short phase: its second half)."""

    conversations: int
    seconds: float
    replicas: tuple[float, ...]  # ready, per stage
    tokens_per_second: float
    possible_rate: float | None  # None: answers of the phase before still run
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
    pods = of(Replicas, settled)
    ready = [[record.ready for record in pods if record.service == stage] for stage in setting.stages]
    replicas = tuple(fmean(found) if found else 0.0 for found in ready)
    first = [answer.time_to_first_token_seconds for answer in of(Answer, within)]
    tokens = [second.tokens for second in of(Second, settled)]
    return PhaseFigures(
        conversations=phase.conversations,
        seconds=end - phase.t,
        replicas=replicas,
        tokens_per_second=fmean(tokens) if tokens else 0.0,
        possible_rate=setting.possible_rate(replicas, phase.conversations) if rises else None,
        first_token_p50=percentile(first, 0.5),
        first_token_p95=percentile(first, 0.95),
        answers=len(first),
        failed=len(_failed_requests(within)),
        rises=rises,
    )


def _failed_requests(records: Sequence[Record]) -> list[Failure]:
    """A failed reading of the metrics, with conversation -1, is none."""
    return [failure for failure in of(Failure, records) if failure.conversation >= 0]


def judge(setting: Setting, records: Sequence[Record]) -> list[Verdict]:
    failures, answers = _failed_requests(records), len(of(Answer, records))
    seen = f"{len(failures)} of {answers + len(failures)}" + (f"; first: {failures[0].reason}" if failures else "")
    verdicts = [Verdict("no request failed", seen, bool(answers) and not failures)]
    verdicts += [_at_zero(records), _only_the_slow_stage(setting, records)]
    for each in phase_figures(setting, records):
        if each.rises:
            what = f"{each.conversations} conversations: throughput by the possible one, {SETTLED_SECONDS:.0f} s after the rise"
            share = each.tokens_per_second / each.possible_rate if each.possible_rate else 0.0
            verdicts.append(judged(what, share, LEAST_SHARE))
    cost = replica_seconds(records).values()
    held, static = sum(each for each, _ in cost), sum(peak for _, peak in cost)
    share = held / static if static else 1.0
    seen = f"{held:.0f} of {static:.0f}: {share:.0%}; {idle_seconds(records):.0f} s of the run at zero"
    what = "replica-seconds, of a static deployment's for the peak"
    return [*verdicts, Verdict(what, seen, share <= MOST_COST, f"≤ {MOST_COST:.0%}")]


def _at_zero(records: Sequence[Record]) -> Verdict:
    replicas = of(Replicas, records)
    last = {record.service: record for record in replicas}
    held = {service: record.held for service, record in last.items() if record.held}
    since = max((record.t for record in replicas if record.held), default=0.0)
    fall = max((phase.t for phase, _ in phases(records) if phase.conversations == 0), default=0.0)
    seen = f"{held} left" if held else f"{since - fall:.0f} s after the last fall"
    return Verdict("all at zero at the end", seen, bool(last) and not held)


def _only_the_slow_stage(setting: Setting, records: Sequence[Record]) -> Verdict:
    pods = of(Replicas, records)
    peaks = [max((each.ready + each.starting for each in pods if each.service == stage), default=0) for stage in setting.stages]
    slow = max(range(len(peaks)), key=lambda stage: setting.sleep_seconds[stage])
    holds = peaks[slow] > 1 and all(peak <= 1 for stage, peak in enumerate(peaks) if stage != slow)
    return Verdict("the slow stage, and not its neighbours, gains replicas", f"at most {_slashed(peaks)}", holds)


def markdown(setting: Setting, records: Sequence[Record]) -> str:
    """Tables of the targets, the phases, and the cost of each Service."""
    figures = [
        [
            each.conversations,
            f"{each.seconds:.0f}",
            _slashed(each.replicas),
            f"{each.tokens_per_second:.0f}",
            "" if each.possible_rate is None else f"{each.possible_rate:.0f}",
            *((f"{each.first_token_p50:.2f} s", f"{each.first_token_p95:.2f} s") if each.answers else ("", "")),
            each.answers,
            each.failed,
        ]
        for each in phase_figures(setting, records)
    ]
    columns = [
        "conversations",
        "seconds",
        "replicas",
        "tokens/s",
        "possible",
        "time to first token p50",
        "p95",
        "answers",
        "failed",
    ]
    cost = replica_seconds(records)
    cost["all"] = sum(held for held, _ in cost.values()), sum(peak for _, peak in cost.values())
    costs = [(name, f"{held:.0f}", f"{peak:.0f}", f"{held / peak:.0%}" if peak else "") for name, (held, peak) in cost.items()]
    return "\n\n".join(
        [
            verdict_table(judge(setting, records)),
            table(columns, figures),
            table(["Service", "replica-seconds", "static, for the peak", "share"], costs),
        ]
    )


def _slashed(numbers: Sequence[float]) -> str:
    return "/".join(f"{number:.1f}".removesuffix(".0") for number in numbers)


def draw(records: Sequence[Record], picture: Path, title: str) -> None:
    """Conversations, replicas, tokens a second, and time to first token over time."""
    figure = Figure(figsize=(10, 10), layout="constrained")
    load, replicas, throughput, first_token = figure.subplots(4, 1, sharex=True)
    seconds = of(Second, records)
    _draw_load(load, records, seconds)
    _draw_replicas(replicas, records)
    throughput.plot([each.t for each in seconds], [each.tokens for each in seconds])
    answers = of(Answer, records)
    waits = [
        [
            answer.time_to_first_token_seconds
            for answer in answers
            if each.t - _WINDOW_SECONDS < answer.started + answer.time_to_first_token_seconds <= each.t
        ]
        for each in seconds
    ]
    first_token.plot([each.t for each in seconds], [percentile(recent, 0.95) for recent in waits])
    named = {
        "conversations": load,
        "ready replicas": replicas,
        "tokens/s": throughput,
        "time to first token,\np95 of 10 s (s)": first_token,
    }
    for name, panel in named.items():
        panel.set_ylabel(name)
        panel.set_ylim(bottom=0)
        panel.grid(visible=True, alpha=0.3)
    first_token.set_xlabel("seconds")
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def _draw_load(panel: Any, records: Sequence[Record], seconds: Sequence[Second]) -> None:
    times, counts = [0.0], [0]
    for phase, end in phases(records):
        times += [phase.t, end]
        counts += [phase.conversations, phase.conversations]
    panel.plot(times, counts, color="black", label="wanted")
    panel.plot([each.t for each in seconds], [each.in_flight for each in seconds], alpha=0.6, label="in flight")
    failed = [failure.t for failure in of(Failure, records)]
    panel.plot(failed, [0.0] * len(failed), "rx", label=f"failed ({len(failed)})")
    panel.legend(loc="upper left")


def _draw_replicas(panel: Any, records: Sequence[Record]) -> None:
    by_service: dict[str, dict[float, float]] = {}
    for record in of(Replicas, records):
        by_time = by_service.setdefault(record.service, {})
        by_time[record.t] = by_time.get(record.t, 0.0) + record.ready
    for service, by_time in sorted(by_service.items()):
        panel.step(list(by_time), list(by_time.values()), where="post", label=service)
    if by_service:
        panel.legend(loc="upper left")
