"""The counter of one token's way: its arithmetic, and one run through real processes."""

from pathlib import Path

import pytest

from bench.walk import Walk, main, measure, parts, table

GATEWAY = Walk(
    {
        ("eventing/problems.py", "document", "eventing/problems.py"): 1.0,
        ("functions/gateway/text/encoder.py", "encode", "functions/gateway/text/encoder.py"): 0.25,
        ("re/__init__.py", "match", "functions/gateway/text/encoder.py"): 2.0,
        ("(hand-over)", "wait", "eventing/problems.py"): 1.0,
    }
)
STAGE = Walk({("eventing/problems.py", "document", "eventing/problems.py"): 2.0})


def test_a_module_counts_once_and_a_librarys_call_belongs_to_the_part_that_makes_it() -> None:
    walks = parts(GATEWAY, STAGE)
    hop, api = walks["hop, together"], walks["API, beside the hop"]
    assert hop.modules == ["eventing/problems.py"]
    assert (hop.project_calls, hop.all_calls, hop.hand_overs) == (3.0, 3.0, 1.0)
    assert (api.modules, api.project_calls, api.all_calls) == ([], 0.25, 2.25)
    lines = len(Path("eventing/problems.py").read_text(encoding="utf-8").splitlines())
    assert f"| hop, together | 1 | {lines} | 3 | 3 | 1.0 |" in table(walks)


@pytest.mark.slow
def test_a_round_through_real_processes_is_counted(tmp_path: Path) -> None:
    gateway, stage = measure(tmp_path)
    assert "functions/gateway/stages/client.py" in gateway.modules
    assert "functions/stage/engine/engine.py" in stage.modules
    assert gateway.hand_overs > 0
    hop = parts(gateway, stage)["hop, together"]
    assert 100 < hop.all_calls < 400, "a token's way has become longer: see docs/log.md, One token's way"
    assert len(hop.modules) <= 35


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--what"]) == 2
    assert "only --list is known" in capsys.readouterr().err
