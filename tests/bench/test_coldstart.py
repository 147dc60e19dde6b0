"""The targets and tables of bench.coldstart."""

from bench.coldstart.report import Results, markdown, verdicts
from bench.coldstart.runs import ColdStart


def run_of(first_token: float, load: float, largest: int) -> ColdStart:
    phases = {
        "process": 0.1,
        "import": 1.0,
        "connect": 0.2,
        "first_byte": 0.3,
        "last_byte": 0.2 + load,
        "place": 1.1,
        "warm_up": 1.2,
    }
    return ColdStart(first_token, "The", (phases,), largest)


def results(first_token_seconds: float) -> Results:
    """Three stages without a limit take `first_token_seconds`; all else is well within its bounds."""
    cold = {stages: [run_of(3.0, 6.0 / stages, 300_000_000 // stages)] for stages in (1, 2, 3, 5)}
    stages, cached = [run_of(first_token_seconds, 0.3, 100_000_000)], [run_of(0.5, 0.1, 100_000_000)]
    return Results(50e6, stages, cached, cold)


def test_targets_are_judged_and_tabulated() -> None:
    assert all(verdict.met for verdict in verdicts(results(0.9)))
    text = markdown(results(0.9))
    assert "missed" not in text
    assert "| 3 | 100 | 2.00 | 2.00 | 1.00 × | 3.00 |" in text
    assert [verdict.what for verdict in verdicts(results(1.2)) if not verdict.met] == ["first token of 3 stages"]
    assert "| first token of 3 stages | ≤ 1.10 s | 1.20 s | missed |" in markdown(results(1.2))
