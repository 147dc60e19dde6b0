"""`make evaluate` in a small version: its sections and how it resumes, not its times."""

from functools import partial
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from bench.evaluation import __main__ as command
from bench.evaluation import experiments, thousand_pods
from bench.evaluation.experiments import Plan
from bench.evaluation.profile import read_profile
from bench.evaluation.results import interval
from bench.evaluation.setting import HPA, KPA, REPLICAS, SMOLLM2_PROFILE, WAYS

SMALL = Plan(
    emulated_loads=("bursts",),
    emulated_ways=(HPA,),
    emulated_seconds=4,
    peak=2.0,
    tail_seconds=6.0,
    answer_tokens=12,
    runs=1,
    simulated_loads=("ramp",),
    simulated_seconds=30,
    simulated_runs=2,
    measured_runs=1,
)


def evaluated(monkeypatch: pytest.MonkeyPatch, plan: Plan, *arguments: str) -> str:
    monkeypatch.setattr(command, "QUICK", plan)
    outcome = CliRunner().invoke(command.main, ["--quick", *arguments])
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


@pytest.mark.slow
def test_simulations_write_their_sections_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "page.md"
    given = (
        "simulated",
        "opponents",
        "faults",
        "measured",
        "--state",
        str(tmp_path / "state"),
        "--document",
        str(document),
    )
    said = evaluated(monkeypatch, SMALL, *given)
    assert "simulated 12/12: ramp, pipeline, objective, run 1" in said
    assert "on disk" not in said
    text = document.read_text()
    for way in WAYS:
        assert f"| {way} | 2 |" in text
        assert f"| {way} | 1 |" in text
    assert "| ramp | static, 5 pods |" in text
    assert "| ramp | clairvoyant pipeline |" in text
    assert "| bursts, both | pipeline, objective | 0 |" in text
    assert "smollm2-135m-instruct on 8 cores, 4 stages" in text
    assert "Passes as measured of native layers in bfloat16, one thread" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"evaluation-{name}.png" for name in ("simulated", "opponents", "measured")
    }
    removed = next((tmp_path / "state").rglob("ramp-pipeline-KPA-1-*.yaml"))
    removed.write_text("broken off: [")
    again = evaluated(monkeypatch, SMALL, *given)
    assert again.count("on disk") == 12 + 16 + 24 + 6 - 1


@pytest.mark.slow
def test_the_system_runs_with_emulated_devices_and_is_compared_with_its_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes, gateway, autoscaler of the HPA class, wire: a few requests, all answered, no pod started from zero."""
    state = tmp_path / "state"
    (state / "quick").mkdir(parents=True)
    (state / "quick" / "overheads.yaml").write_text(
        "pass_seconds: 0.002\nhops: {hop_seconds: 0.004, hop_token_seconds: 1.0e-5}\n"
    )
    document = tmp_path / "page.md"
    evaluated(monkeypatch, SMALL, "emulated", "calibration", "--state", str(state), "--document", str(document))
    results = command.Results(state / "quick" / "results")
    (found,) = [results.read(run.key) for run in experiments.emulated(SMALL, pytest.fail, state)]
    assert found is not None
    assert found.outcome.requests > 2
    assert found.outcome.failed < found.outcome.requests
    assert found.outcome.token_seconds[0] > 0.05
    seconds = found.outcome.seconds
    assert found.outcome.cost.replica_seconds == pytest.approx(4 * seconds, rel=0.05)
    assert found.outcome.cost.network_bytes > 500 * 3 * 2 * 2 * 5120
    text = document.read_text()
    assert "| bursts | pipeline, HPA | 1 | replica-seconds |" in text
    assert "2.0 ms a pass, 4.0 ms a hop, and 10 µs" in text


def test_passes_of_a_measured_profile_are_those_that_are_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed profile has results of its own."""
    setting = experiments.setting_smollm2()
    profile = read_profile(SMOLLM2_PROFILE)
    assert setting.pass_times(REPLICAS) == [profile.of_stage(0, 30, 30)]
    assert setting.pass_times(KPA) == [profile.of_stage(*piece, 30) for piece in setting.cut(KPA)]
    before = next(experiments.measured(SMALL))
    slower = msgspec.structs.replace(profile, layer_stream_seconds=10 * profile.layer_stream_seconds)
    monkeypatch.setattr(experiments, "read_profile", lambda _: slower)
    after = next(experiments.measured(SMALL))
    assert after.key.file_name != before.key.file_name
    assert after.action().outcome.token_seconds[0] > 1.5 * before.action().outcome.token_seconds[0]


def test_an_invalid_trace_ends_the_command_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "some.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,0,44\n")
    monkeypatch.setattr(command, "QUICK", SMALL)
    outcome = CliRunner().invoke(command.main, ["--quick", "simulated", "--trace", str(trace), "--state", str(tmp_path)])
    assert outcome.exit_code == 1
    assert "some.csv, line 2: ContextTokens is '0'" in outcome.output


def test_intervals_are_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / 3**0.5))
    assert interval([5.0])[0] == 5.0


def test_what_a_thousand_pods_take_is_computed_from_what_one_copy_bears(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 requests a second for each of 250 copies, 171 tokens of answer each; a gateway's core draws 4,744 tokens a second."""
    written: list[str] = []
    monkeypatch.setattr(thousand_pods, "requests_a_second", lambda: 3.0)
    monkeypatch.setattr(thousand_pods, "real_time_factor", lambda *_: 2.0)
    monkeypatch.setattr(thousand_pods, "relayed_bytes_a_second", partial(thousand_pods.relayed_bytes_a_second, seconds=0.01))
    monkeypatch.setattr(thousand_pods, "write_section", lambda *given: written.append(given[-1]))
    assert CliRunner().invoke(thousand_pods.main).exit_code == 0
    assert "4,744.0 tokens/s, a core | 27.1 gateways | 738 pods |" in written[0]
    assert "0.20 × real time" in written[0]
