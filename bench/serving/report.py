"""The findings of `bench.serving`, their targets, and the section of docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from matplotlib.figure import Figure

from bench.report import Verdict, judged, milliseconds, p99, table, verdict_table
from bench.serving.contenders import CONCURRENT, LLAMA_CPP, PREFILL, SINGLE, Results, rate, ratio
from bench.serving.round import RoundTime

BF16: Final = "Lamina bfloat16"
INT8: Final = "Lamina int8"
Q4: Final = "Lamina q4"
_TITLES: Final = {
    SINGLE: "Single stream: a prompt of 128 tokens",
    CONCURRENT: "16 concurrent: prompts of 16 to 512, answers of 16 to 256 tokens",
    PREFILL: "Prefill: a prompt of 1,024 tokens, one token of answer (tokens/s are the prompt's)",
}


@dataclass(frozen=True, slots=True)
class Findings:
    """All findings of one run."""

    results: Results
    rounds: Mapping[str, RoundTime]  # by dtype, micro-batches, and whether through queue-proxies
    did_not_run: Mapping[str, str]  # contender → reason


def verdicts(found: Findings) -> list[Verdict]:
    """The targets that this run could measure."""
    single, concurrent, prefill = (found.results.get(workload, {}) for workload in (SINGLE, CONCURRENT, PREFILL))
    against_llama_cpp = [
        ("single stream, q4, × llama.cpp", 1.35, ratio(single, Q4, LLAMA_CPP)),
        ("16 concurrent, best dtype, × llama.cpp", 4.3, max(ratio(concurrent, own, LLAMA_CPP) for own in (BF16, INT8, Q4))),
        ("prefill of 1k, best dtype, × llama.cpp", 5.0, max(ratio(prefill, own, LLAMA_CPP) for own in (BF16, INT8, Q4))),
    ]
    told = [
        judged(what, seen or None, wanted) for what, wanted, seen in against_llama_cpp if seen or LLAMA_CPP in found.did_not_run
    ]
    for name, wanted in (("int8, 2 × 8", 0.15), ("bfloat16, 2 × 8", 0.08)):
        if name in found.rounds:
            share = found.rounds[name].transport_share
            told.append(judged(f"transport and codec of a round, {name}", share, wanted, at_most=True, number="{:.1%}"))
    return told


def markdown(found: Findings, facts: Sequence[str], picture: str) -> str:
    parts = ["## Serving", *facts, f"![Tokens per second of all contenders]({picture})\n", verdict_table(verdicts(found))]
    parts += [_workload_table(found, workload) for workload in found.results]
    return "\n".join([*parts, _round_table(found.rounds)])


def _workload_table(found: Findings, workload: str) -> str:
    results, rows = found.results[workload], list[Sequence[str]]()
    for name, measured in results.items():
        first = [seconds for each in measured for seconds in each.first_token_seconds]
        gaps = [seconds for each in measured for seconds in each.gap_seconds]
        cpu = median(each.cpu_seconds / each.tokens * 1000 for each in measured)
        against_llama_cpp = ratio(results, name, LLAMA_CPP)
        rows.append(
            [
                name,
                milliseconds(median(first)) if first else "–",
                milliseconds(median(gaps)) if gaps else "–",
                milliseconds(p99(gaps)) if gaps else "–",
                f"{rate(measured):.1f}",
                f"{against_llama_cpp:.2f}" if against_llama_cpp else "–",
                f"{cpu:.1f}",
            ]
        )
    rows += [[f"{name} did not run: {why}", *["–"] * 6] for name, why in found.did_not_run.items()]
    columns = ["", "first token, ms", "between tokens p50, ms", "p99, ms", "tokens/s", "× llama.cpp", "CPU s per 1k tokens"]
    return f"\n### {_TITLES[workload]}\n\n{table(columns, rows)}"


def _round_table(rounds: Mapping[str, RoundTime]) -> str:
    rows = [
        [
            name,
            milliseconds(each.compute),
            milliseconds(each.queue),
            *(milliseconds(seconds, 2) for seconds in (each.codec, each.http, each.gateway)),
            milliseconds(each.total),
            f"{each.transport_share:.1%}",
        ]
        for name, each in rounds.items()
    ]
    columns = ["", "compute", "queue", "codec", "HTTP", "gateway", "round", "codec and HTTP"]
    return (
        "\n### Parts of a decode step\n\n"
        "A micro-batch's round through the three stages, milliseconds; `2 × 8`: two micro-batches of eight are under way.\n\n"
        + table(columns, rows)
    )


def draw(found: Findings, picture: Path) -> None:
    """Tokens per second of all contenders, and the parts of a decode step."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    *panels, last = figure.subplots(2, 2).flat
    for panel, (workload, measured) in zip(panels, found.results.items(), strict=False):
        names = list(measured)[::-1]
        rates = [rate(measured[name]) for name in names]
        colors = ["tab:blue" if name.startswith("Lamina") else "tab:gray" for name in names]
        panel.bar_label(panel.barh(names, rates, color=colors), fmt="%.0f", padding=2)
        panel.set_title(f"{workload}: tokens/s")
        panel.margins(x=0.12)
    names = list(found.rounds)[::-1]
    left = [0.0] * len(names)
    for part in ("compute", "queue", "codec", "http", "gateway"):
        widths = [getattr(found.rounds[name], part) * 1000 for name in names]
        last.barh(names, widths, left=left, label=part)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    last.set_title("one round of a micro-batch, ms")
    last.legend(fontsize="small")
    figure.savefig(picture, dpi=110)
