"""The sections of docs/benchmarks.md and their figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.evaluation.loads import LOADS
from bench.evaluation.outcome import Objective
from bench.evaluation.plots import draw_scale, draw_ways
from bench.evaluation.profile import read_profile
from bench.evaluation.report import calibration_table, claims, scale_table, ways_table
from bench.evaluation.results import Result
from bench.evaluation.rounds import Overheads
from bench.evaluation.setting import SMOLLM2_PROFILE
from bench.report import machine, write_section


def write_document(
    document: Path | None,
    found: Mapping[str, Sequence[Result]],
    overheads: Overheads | None,
    command: str,
    seconds: float,
    networks: tuple[str, str] | None,
) -> dict[str, str]:
    """Section → Markdown, written where there is a document. Figures lie beside it."""
    facts = f"`{command}` on {machine()}; {seconds / 60:.0f} minutes, earlier results are not counted."
    pages: dict[str, str] = {}
    profile = read_profile(SMOLLM2_PROFILE)
    for name, title, note in (
        ("emulated", "Five ways, devices emulated and the system real", ""),
        ("simulated", "Five ways, simulated for longer", ""),
        (
            "measured",
            "Five ways, simulated by measured passes",
            f" Passes as measured of {profile.source}; the fit is off by {profile.worst_error or 0:.0%} at its worst point.",
        ),
    ):
        if found.get(name):
            pages[name] = _ways(found[name], f"## {title}", facts + note, document, name)
    if found.get("calibration") and overheads is not None:
        pages["calibration"] = _calibration(found.get("emulated", []), found["calibration"], overheads, facts)
    if found.get("scale"):
        pages["scale"] = _scale(found["scale"], facts, document)
    if networks is not None:
        table, verdict = networks
        text = (
            "SmolLM2-135M in bfloat16, three stages with real layers, one replica each, micro-batches of 8; questions whose "
            "answers quote. Delay and rate are those of every pod's link (`knative/local/proxies/network.py`). The "
            f"prediction of `plan` is computed from the passes without a network. **{verdict}** The last columns show each "
            "remedy alone, in tokens/s and relative to the tokens/s without a network: draft tokens (at most 16 a row), hidden "
            "states in 8 bits ([effect on answers](#8-bits-on-the-wire)), and the same model in two stages."
        )
        pages["network"] = f"## What a network between the pods costs\n\n{facts} {text}\n\n{table}"
    if document is not None:
        for name, text in pages.items():
            write_section(document, name, text)
    return pages


def _ways(results: Sequence[Result], title: str, facts: str, document: Path | None, name: str) -> str:
    key, wanted = results[0].key, Objective()
    loads = [load for load in LOADS if any(each.key.load == load for each in results)]
    source = (
        "drawn from a seed, with the sizes of the Azure trace of 2023" if key.trace is None else "of the trace that was named"
    )
    averages = [each.load_average for each in results if each.load_average is not None]
    busy = f" Load average of the machine behind each run: {min(averages):.1f} to {max(averages):.1f}." if averages else ""
    lines = [
        title,
        "",
        f"{facts} {key.setting}; {key.seconds} s of each load with a peak of {key.peak:g} requests/s, {source}; answers of at "
        f"most {key.answer_tokens} tokens. Objective: first token in {wanted.first_token_seconds:g} s, then "
        f"{wanted.token_seconds * 1000:g} ms a token. Means and 95 % intervals over runs of different seeds.{busy}",
    ]
    for load in loads:
        lines += ["", f"### {load.capitalize()}", "", ways_table(results, load)]
    lines += ["", "### The paper's claims: the pipelines that scale, against the others", "", claims(results, loads)]
    if document is not None:
        picture = document.with_name(f"evaluation-{name}.png")
        draw_ways(results, loads, picture)
        lines += ["", f"![first token, objective and cost of five ways under each load]({picture.name})"]
    return "\n".join(lines)


def _calibration(emulated: Sequence[Result], simulated: Sequence[Result], overheads: Overheads, facts: str) -> str:
    table, met, count = calibration_table(emulated, simulated)
    return "\n".join(
        [
            "## How far the simulation is to be believed",
            "",
            f"{facts} The emulated runs once more, simulated. What they cost beside the profile was measured under a "
            f"steady load: {overheads.pass_seconds * 1e3:.1f} ms a pass and {overheads.hop_seconds * 1e3:.1f} ms a hop. "
            f"**{met} of {count} comparisons are within their bounds.**",
            "",
            table,
        ]
    )


def _scale(results: Sequence[Result], facts: str, document: Path | None) -> str:
    key = results[0].key
    source = "a Poisson load with the trace's rate and sizes" if key.trace is None else "the trace"
    lines = [
        "## A hundred times the trace: 13B and 70B, whole or in pieces",
        "",
        f"{facts} Simulated, {key.seconds} s of {source}, 100 times over, from zero, at most 1,024 devices, Knative's "
        f"autoscaler; {sum(each.key.load == key.load for each in results)} runs each.",
        "",
        scale_table(results),
    ]
    if document is not None:
        picture = document.with_name("evaluation-scale.png")
        draw_scale(results, picture)
        lines += ["", f"![cost and first token by the number of stages]({picture.name})"]
    return "\n".join(lines)
