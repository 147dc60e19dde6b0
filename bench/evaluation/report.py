"""docs/benchmarks.md: a section for each experiment, from results alone."""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Final

from bench.evaluation.outcome import Outcome
from bench.evaluation.results import Result, interval
from bench.evaluation.setting import WAYS

Column = tuple[str, Callable[[Outcome], float], str]
COLUMNS: Final[tuple[Column, ...]] = (
    ("first token p50", lambda o: o.first_token_seconds[0], "{:.2f} s"),
    ("p95", lambda o: o.first_token_seconds[1], "{:.2f} s"),
    ("p99", lambda o: o.first_token_seconds[2], "{:.2f} s"),
    ("per token p50", lambda o: o.token_seconds[0] * 1e3, "{:.0f} ms"),
    ("p95", lambda o: o.token_seconds[1] * 1e3, "{:.0f} ms"),
    ("p99", lambda o: o.token_seconds[2] * 1e3, "{:.0f} ms"),
    ("tokens/s", lambda o: o.tokens_per_second, "{:.0f}"),
    ("within objective", lambda o: o.attainment * 100, "{:.0f} %"),
    ("failed", lambda o: o.failed / max(1, o.requests) * 100, "{:.1f} %"),
    ("replica-seconds", lambda o: o.cost.replica_seconds, "{:.0f}"),
    ("TB-seconds", lambda o: o.cost.byte_seconds / 1e12, "{:.1f}"),
    ("cold starts", lambda o: o.cost.cold_starts, "{:.0f}"),
    ("network", lambda o: o.cost.network_bytes / 1e9, "{:.1f} GB"),
)
CALIBRATED: Final[tuple[tuple[str, Callable[[Outcome], float], float], ...]] = (
    ("tokens/s", lambda o: o.tokens_per_second, 0.10),
    ("first token p95", lambda o: o.first_token_seconds[1], 0.10),
    ("per token p95", lambda o: o.token_seconds[1], 0.10),
    ("replica-seconds", lambda o: o.cost.replica_seconds, 0.05),
)
"""What the simulation is held to, and how near it has to be."""


def ways_table(results: Sequence[Result], load: str) -> str:
    """Means and 95 % intervals of the five ways under one load."""
    lines = ["| way | runs | " + " | ".join(name for name, _, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for way in WAYS:
        found = [each.outcome for each in results if (each.key.load, each.key.way) == (load, way)]
        if found:
            cells = " | ".join(_cell([read(one) for one in found], form) for _, read, form in COLUMNS)
            lines.append(f"| {way} | {len(found)} | {cells} |")
    return "\n".join(lines)


def claims(results: Sequence[Result], loads: Iterable[str]) -> str:
    """The paper's two claims for the pipelines that scale: against what stands still, and against whole-model replicas."""
    lines = ["| load | way | against | first token p95 | tokens/s | within objective | replica-seconds |", "|---" * 7 + "|"]
    for load in loads:
        means = {way: _means(results, load, way) for way in WAYS}
        for way in WAYS[3:]:
            for other in (WAYS[0], WAYS[2], WAYS[1]):
                one, two = means[way], means[other]
                if one is None or two is None:
                    continue
                ratios = [f"{a / b:.2f} ×" if b else "–" for a, b in zip(one[:2], two[:2], strict=True)]
                points = f"{(one[2] - two[2]) * 100:+.0f} points"
                lines.append(f"| {load} | {way} | {other} | {ratios[0]} | {ratios[1]} | {points} | {one[3] / two[3]:.2f} × |")
    return "\n".join(lines)


def _means(results: Sequence[Result], load: str, way: str) -> tuple[float, float, float, float] | None:
    found = [each.outcome for each in results if (each.key.load, each.key.way) == (load, way)]
    if not found:
        return None
    reads: tuple[Callable[[Outcome], float], ...] = (
        lambda o: o.first_token_seconds[1],
        lambda o: o.tokens_per_second,
        lambda o: o.attainment,
        lambda o: o.cost.replica_seconds,
    )
    one, two, three, four = (fmean(read(each) for each in found) for read in reads)
    return one, two, three, four


def calibration_table(emulated: Sequence[Result], simulated: Sequence[Result]) -> tuple[str, int, int]:
    """Means of emulated and simulated runs side by side; how many comparisons are within their bound, and of how many."""
    lines = ["| load | way | what | emulated | simulated | error | bound |", "|---" * 7 + "|"]
    met = count = 0
    pairs = dict.fromkeys((each.key.load, each.key.way) for each in emulated)
    for load, way in pairs:
        one, other = (
            [each.outcome for each in results if (each.key.load, each.key.way) == (load, way)]
            for results in (emulated, simulated)
        )
        if not one or not other:
            continue
        for name, read, bound in CALIBRATED:
            seen, said = fmean(map(read, one)), fmean(map(read, other))
            error = said / seen - 1 if seen else math.nan
            within = abs(error) <= bound
            met, count = met + within, count + 1
            mark = "" if within else " **missed**"
            lines.append(f"| {load} | {way} | {name} | {seen:.3g} | {said:.3g} | {error:+.0%}{mark} | {bound:.0%} |")
    return "\n".join(lines), met, count


def scale_table(results: Sequence[Result]) -> str:
    lines = [
        "| model, cut | devices | peak pods | first token p50 | p95 | per token p50 | tokens/s | within objective | failed "
        "| replica-seconds | TB-seconds | cold starts | × real time |",
        "|---" * 13 + "|",
    ]
    for load in dict.fromkeys(each.key.load for each in results):
        found = [each for each in results if each.key.load == load]
        device = found[0].key.setting.split(" on ")[1].split(",")[0]
        outcomes = [each.outcome for each in found]
        if not any(one.requests for one in outcomes):
            lines.append(f"| {load} | {device} | does not fit a device |" + " |" * 10)
            continue
        peak = max(each.peak_pods or 0 for each in found)
        reads = [COLUMNS[index] for index in (0, 1, 3, 6, 7, 8, 9, 10, 11)]
        cells = " | ".join(_cell([read(one) for one in outcomes], form) for _, read, form in reads)
        speed = fmean(each.outcome.seconds / (each.wall_seconds or math.nan) for each in found)
        lines.append(f"| {load} | {device} | {peak} | {cells} | {speed:.0f} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], form: str) -> str:
    mean, half = interval(values)
    if not math.isfinite(mean):
        return "–"
    text = form.format(mean)
    if not math.isfinite(half) or half < 0.005 * abs(mean):
        return text
    number, _, unit = form.partition("}")
    return f"{(number + '}').format(mean)} ± {(number + '}').format(half)}{unit}"
