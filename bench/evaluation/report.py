"""The sections of docs/benchmarks.md and their figures, from results alone."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Final

from matplotlib.figure import Figure

from bench.evaluation.outcome import MOST_FIRST_TOKEN_SECONDS, MOST_TOKEN_SECONDS, Outcome
from bench.evaluation.profile import read_profile
from bench.evaluation.results import Result, interval
from bench.evaluation.setting import COPY, HPA, KPA, OBJECTIVE, REPLICAS, SMOLLM2_PROFILE, STATIC, WAYS
from bench.evaluation.simulator import Overheads
from bench.report import machine, table, write_section

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
# What the simulation must predict, and the allowed error.
CALIBRATED: Final[tuple[tuple[str, Callable[[Outcome], float], float], ...]] = (
    ("tokens/s", lambda o: o.tokens_per_second, 0.10),
    ("first token p95", lambda o: o.first_token_seconds[1], 0.10),
    ("per token p95", lambda o: o.token_seconds[1], 0.10),
    ("replica-seconds", lambda o: o.cost.replica_seconds, 0.05),
)


def ways_table(results: Sequence[Result], load: str) -> str:
    """Means and 95 % intervals of all ways under one load."""
    rows: list[list[object]] = []
    for way in WAYS:
        if found := _outcomes(results, load, way):
            rows.append([way, len(found), *(_cell([read(one) for one in found], form) for _, read, form in COLUMNS)])
    return table(["way", "runs", *(name for name, _, _ in COLUMNS)], rows)


def _outcomes(results: Sequence[Result], load: str, way: str) -> list[Outcome]:
    return [each.outcome for each in results if (each.key.load, each.key.way) == (load, way)]


def claims(results: Sequence[Result], loads: Iterable[str]) -> str:
    """The paper's two claims: scaling pipelines compared with static deployments and with whole-model replicas."""
    rows = []
    for load in loads:
        means = {way: _means(results, load, way) for way in WAYS}
        for way in (HPA, KPA, OBJECTIVE):
            for other in (COPY, STATIC, REPLICAS):
                one, two = means[way], means[other]
                if one is None or two is None:
                    continue
                ratios = [f"{a / b:.2f} ×" if b else "–" for a, b in zip(one[:2], two[:2], strict=True)]
                points = f"{(one[2] - two[2]) * 100:+.0f} points"
                rows.append([load, way, other, *ratios, points, f"{one[3] / two[3]:.2f} ×"])
    columns = ["load", "way", "against", "first token p95", "tokens/s", "within objective", "replica-seconds"]
    return table(columns, rows)


def _means(results: Sequence[Result], load: str, way: str) -> tuple[float, float, float, float] | None:
    """Of p95 of the first token, tokens a second, attainment, and replica-seconds."""
    if not (found := _outcomes(results, load, way)):
        return None
    return (
        fmean(each.first_token_seconds[1] for each in found),
        fmean(each.tokens_per_second for each in found),
        fmean(each.attainment for each in found),
        fmean(each.cost.replica_seconds for each in found),
    )


def calibration_table(emulated: Sequence[Result], simulated: Sequence[Result]) -> tuple[str, int, int, float]:
    """Means of emulated and simulated runs of the same seeds side by side.

    A comparison is within its bound if the error is, or if it is within the emulated runs' own 95 % interval. Also returns how
    many comparisons are, of how many, and the widest interval of a p95, as a share of its mean.
    """
    rows = []
    met = count = 0
    widest = 0.0
    for load, way in dict.fromkeys((each.key.load, each.key.way) for each in emulated):
        of_emulated = {each.key.seed: each.outcome for each in emulated if (each.key.load, each.key.way) == (load, way)}
        of_simulated = {each.key.seed: each.outcome for each in simulated if (each.key.load, each.key.way) == (load, way)}
        seeds = sorted(of_emulated.keys() & of_simulated.keys())
        for name, read, bound in CALIBRATED if seeds else ():
            seen, half = interval(read(of_emulated[seed]) for seed in seeds)
            said = fmean(read(of_simulated[seed]) for seed in seeds)
            own = half / seen if seen and math.isfinite(half) else 0.0
            widest = max(widest, own if "p95" in name else 0.0)
            error = said / seen - 1 if seen else math.nan
            within = abs(error) <= max(bound, own)
            met, count = met + within, count + 1
            mark = "" if abs(error) <= bound else " (own interval)" if within else " **missed**"
            cells = [f"{seen:.3g}", f"± {own:.0%}" if own else "–", f"{said:.3g}", f"{error:+.0%}{mark}", f"{bound:.0%}"]
            rows.append([load, way, len(seeds), name, *cells])
    columns = ["load", "way", "runs", "quantity", "emulated", "95 %", "simulated", "error", "bound"]
    return table(columns, rows), met, count, widest


def opponents_table(results: Sequence[Result]) -> str:
    """The pipeline that scales beside static ones of any size and a clairvoyant one, each compared with the largest static one.

    Runs of the same seed are compared.
    """
    rows: list[list[object]] = []
    for load in dict.fromkeys(each.key.load for each in results):
        of_way: dict[str, dict[int, Outcome]] = {}
        for each in results:
            if each.key.load == load:
                of_way.setdefault(each.key.way, {})[each.key.seed] = each.outcome
        largest = of_way[[way for way in of_way if way.startswith("static")][-1]]
        for way, found in of_way.items():
            row: list[object] = [load, way]
            for index in (1, 4, 9):
                _, read, form = COLUMNS[index]
                row.append(_cell([read(one) for one in found.values()], form))
                row.append(_cell([read(one) / read(largest[seed]) for seed, one in found.items()], "{:.2f} ×"))
            _, read, form = COLUMNS[7]
            rows.append([*row, _cell([read(one) for one in found.values()], form)])
    names = ("first token p95", "per token p95", "replica-seconds")
    columns = [column for name in names for column in (name, "of the largest")]
    return table(["load", "way", *columns, "within objective"], rows)


def faults_table(results: Sequence[Result]) -> str:
    """Pauses between two tokens of an answer, and failed answers, with faults and without."""
    rows: list[list[object]] = []
    for load, way in dict.fromkeys((each.key.load, each.key.way) for each in results):
        found = _outcomes(results, load, way)
        pauses = [one.pauses for one in found if one.pauses is not None]
        tail, longest = (_cell([each[index] for each in pauses], "{:.2f} s") for index in (0, 1))
        first = _cell([one.first_token_seconds[1] for one in found], "{:.2f} s")
        rows.append([load, way, sum(one.failed for one in found), first, tail, longest])
    return table(["load", "way", "failed", "first token p95", "pause p99.9", "longest pause"], rows)


def draw_opponents(results: Sequence[Result], path: Path) -> None:
    """A panel for each load: replica-seconds against p95 of the first token."""
    loads = _loads(results)
    figure = Figure(figsize=(4 * len(loads), 4), layout="constrained")
    for panel, load in zip(figure.subplots(1, len(loads), squeeze=False)[0], loads, strict=True):
        points = {}
        for way in dict.fromkeys(each.key.way for each in results if each.key.load == load):
            found = _outcomes(results, load, way)
            cost = fmean(one.cost.replica_seconds for one in found)
            points[way] = cost, fmean(one.first_token_seconds[1] for one in found)
        static = [point for way, point in points.items() if way.startswith("static")]
        panel.plot(*zip(*static, strict=True), "o-", color="tab:gray", label="static, 4 to 8 pods")
        for way, point in points.items():
            if not way.startswith("static"):
                panel.plot(*point, "*", markersize=12, label=way)
        panel.set_title(load)
        panel.set_yscale("log")
        panel.set_xlabel("replica-seconds")
    figure.axes[0].set_ylabel("first token p95, s")
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


def _cell(values: Sequence[float], form: str) -> str:
    mean, half = interval(values)
    if not math.isfinite(mean):
        return "–"
    text = form.format(mean)
    if not math.isfinite(half) or half < 0.005 * abs(mean):
        return text
    number, _, unit = form.partition("}")
    return f"{(number + '}').format(mean)} ± {(number + '}').format(half)}{unit}"


_PANELS: Final[tuple[tuple[str, Callable[[Outcome], float]], ...]] = (
    ("first token p95, s", lambda o: o.first_token_seconds[1]),
    ("within the objective, %", lambda o: o.attainment * 100),
    ("replica-seconds", lambda o: o.cost.replica_seconds),
)


def draw_ways(results: Sequence[Result], path: Path) -> None:
    """A panel for each measure, a group of bars for each load."""
    loads = _loads(results)
    figure = Figure(figsize=(5 * len(_PANELS), 4), layout="constrained")
    panels = figure.subplots(1, len(_PANELS))
    width = 0.8 / len(WAYS)
    for panel, (title, read) in zip(panels, _PANELS, strict=True):
        for number, way in enumerate(WAYS):
            found = [interval(map(read, _outcomes(results, load, way))) for load in loads]
            places = [index + (number - len(WAYS) // 2) * width for index in range(len(loads))]
            halves = [0.0 if half != half else half for _, half in found]
            panel.bar(places, [mean for mean, _ in found], width, yerr=halves, label=way, capsize=2)
        panel.set_xticks(range(len(loads)), loads)
        panel.set_title(title)
    panels[0].set_yscale("log")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=len(WAYS))
    figure.savefig(path, dpi=110)


def write_document(
    document: Path | None,
    found: Mapping[str, Sequence[Result]],
    overheads: Overheads | None,
    command: str,
    seconds: float,
    networks: tuple[str, str] | None,
) -> dict[str, str]:
    """Section → Markdown. Writes the sections and their figures if a document is given."""
    facts = f"`{command}` on {machine()}; {seconds / 60:.0f} minutes, earlier results are not counted."
    pages: dict[str, str] = {}
    profile = read_profile(SMOLLM2_PROFILE)
    for name, title, note in (
        ("emulated", "Ways to serve, devices emulated and the system real", ""),
        ("simulated", "Ways to serve, simulated", ""),
        (
            "measured",
            "Ways to serve, simulated by measured passes",
            f" Passes as measured of {profile.source}; the fit is off by {profile.worst_error or 0:.0%} at its worst point.",
        ),
    ):
        if found.get(name):
            pages[name] = _ways(found[name], f"## {title}", facts + note)
    if found.get("calibration") and overheads is not None:
        pages["calibration"] = _calibration(found.get("emulated", []), found["calibration"], overheads, facts)
    if opponents := found.get("opponents"):
        key = opponents[0].key
        pages["opponents"] = (
            f"## The pipeline that scales and its opponents\n\n{facts} Simulated: {key.setting}; {key.seconds} s of each load "
            f"with a peak of {key.peak:g} requests/s, the same seeds for all. A static pipeline has its pods at the stages "
            "with most work. The clairvoyant one knows the arrivals: its pods are ready just before they are needed, one for "
            f"two events in flight in a full pipeline, and a pod that will be needed again soon stays.\n\n"
            f"{opponents_table(opponents)}"
        )
    if faults := found.get("faults"):
        pages["faults"] = (
            f"## Bursts while pods die\n\n{facts} Simulated, {faults[0].key.seconds} s. A pod's process is killed every 20 s, "
            f"and one pod takes three times as long for a pass.\n\n{faults_table(faults)}"
        )
    if networks is not None:
        network_table, verdict = networks
        text = (
            "SmolLM2-135M in bfloat16, three stages with real layers, one replica each, micro-batches of 8; questions whose "
            "answers quote. Delay and rate are those of every pod's link (`knative/local/proxies/network.py`). The "
            f"prediction of `plan` is computed from the passes without a network. **{verdict}** The last columns show each "
            "remedy alone, in tokens/s and relative to the tokens/s without a network: draft tokens (at most 16 a row), hidden "
            "states in 8 bits ([effect on answers](#8-bits-on-the-wire)), and the same model in two stages."
        )
        pages["network"] = f"## What a network between the pods costs\n\n{facts} {text}\n\n{network_table}"
    if document is not None:
        for name in pages.keys() & _PICTURES.keys():
            draw, what = _PICTURES[name]
            picture = document.with_name(f"evaluation-{name}.png")
            draw(found[name], picture)
            pages[name] += f"\n\n![{what}]({picture.name})"
        for name, text in pages.items():
            write_section(document, name, text)
    return pages


_WAYS_PICTURE: Final = draw_ways, "first token, objective and cost of each way under each load"
_PICTURES: Final = {
    **dict.fromkeys(("emulated", "simulated", "measured"), _WAYS_PICTURE),
    "opponents": (draw_opponents, "replica-seconds against the first token of each way"),
}


def _loads(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(each.key.load for each in results))


def _ways(results: Sequence[Result], title: str, facts: str) -> str:
    key, loads = results[0].key, _loads(results)
    source = (
        "drawn from a seed, with the sizes of the Azure trace of 2023" if key.trace is None else "of the trace that was named"
    )
    averages = [each.load_average for each in results if each.load_average is not None]
    busy = f" Load average of the machine behind each run: {min(averages):.1f} to {max(averages):.1f}." if averages else ""
    lines = [
        title,
        "",
        f"{facts} {key.setting}; {key.seconds} s of each load with a peak of {key.peak:g} requests/s, {source}; answers of at "
        f"most {key.answer_tokens} tokens. Objective: first token in {MOST_FIRST_TOKEN_SECONDS:g} s, then "
        f"{MOST_TOKEN_SECONDS * 1000:g} ms a token. Means and 95 % intervals over runs of different seeds.{busy}",
    ]
    for load in loads:
        lines += ["", f"### {load.capitalize()}", "", ways_table(results, load)]
    lines += ["", "### The paper's claims: the pipelines that scale, against the others", "", claims(results, loads)]
    return "\n".join(lines)


def _calibration(emulated: Sequence[Result], simulated: Sequence[Result], overheads: Overheads, facts: str) -> str:
    calibrated, met, count, widest = calibration_table(emulated, simulated)
    key, hops = emulated[0].key, overheads.hops
    averages = [each.load_average for each in emulated if each.load_average is not None]
    return "\n".join(
        [
            "## How far the simulation is to be believed",
            "",
            f"{facts} The emulated runs once more, simulated: {key.setting}; {key.seconds} s of each load with a peak of "
            f"{key.peak:.3g} requests/s, in bursts of {key.bursts[0]} s with pauses of {key.bursts[1]} s; answers of at most "
            f"{key.answer_tokens} tokens; the same seeds. What a run costs beside the profile was measured under steady load: "
            f"{overheads.pass_seconds * 1e3:.1f} ms a pass, {hops.hop_seconds * 1e3:.1f} ms a hop, and "
            f"{hops.hop_token_seconds * 1e6:.0f} µs for each token of a prompt's chunk. Load average of the machine: "
            f"{min(averages):.0f} to {max(averages):.0f}. A comparison is within its bound if the error is, or if it is within "
            f"the emulated runs' own 95 % interval. **{met} of {count} comparisons are within their bounds**; the widest "
            f"interval of a p95 is ± {widest:.0%} (wanted: 20 %).",
            "",
            calibrated,
        ]
    )
