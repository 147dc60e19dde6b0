"""The command line: failures are one clear line, and `run` leaves no process behind."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from knative.__main__ import main
from knative.commands.ask import is_question
from knative.local.platform import ROOT
from tests.storage.checkpoints.test_gguf_families import write_gguf
from tests.support.knative.manifests import fleet_document, member_document
from tests.support.knative.run_command import Run
from tests.support.storage.storage import default_model_gguf

LLAMA = str(ROOT / "examples" / "llama-2-13b")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="python -m knative")


@pytest.mark.slow
def test_run_ask_status_and_ctrl_c(running: Run) -> None:
    running.start()
    running.read_until("serving on http://")
    running.note_store()
    assert running.store_endpoint is not None
    url = re.findall(r"serving on (http://[\d.:]+)", running.seen)[0]
    asked = invoke("ask", url, "ab", "--max-tokens", "2")
    assert asked.exit_code == 0, asked.output
    assert "+ 2 tokens" in asked.output
    shown = invoke("status", "--state", str(running.state))
    assert len(re.findall(r"^lamina\S* +1 ", shown.output, re.MULTILINE)) == 3
    planned = invoke("plan", "--model", "tiny-model", "--dtype", "float32", "--stages", "2", "--state", str(running.state))
    assert "cut: 0:" in planned.output, planned.output
    second = invoke("run", "--state", str(running.state))
    assert second.exit_code == 1
    assert "another run uses" in second.output
    running.send(signal.SIGINT)
    assert running.finish() == 0
    assert running.processes() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "number"), [("publishing", signal.SIGINT), ("all at zero", signal.SIGINT), ("s0: starting", signal.SIGTERM)]
)
def test_a_signal_at_any_phase_leaves_no_process(running: Run, after: str, number: signal.Signals) -> None:
    # A shell without job control starts what it runs in the background with SIGINT ignored.
    running.start(inside=("sh", "-c", 'trap "" INT; exec "$@"', "sh"))
    running.read_until(after)
    running.note_store()
    running.send(number)
    assert running.finish() in (0, 130), running.seen
    assert "Traceback" not in running.seen
    assert running.processes() == []


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_the_next_one_reports_it(running: Run) -> None:
    running.start()
    running.read_until("serving on")
    running.note_store()
    assert running.store_endpoint is not None
    running.send(signal.SIGKILL)
    running.finish()
    deadline = time.monotonic() + 20
    while running.processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running.processes() == []
    running.start("--once")
    running.seen = ""
    assert running.finish() == 0
    assert "ended without cleaning up" in running.seen
    assert re.search(r"^http://127\.0\.0\.1:\d+/ in a browser: .*\n.* all at zero; gateway http", running.seen, re.MULTILINE)
    assert re.search(r"\(\d+ \+ 3 tokens, first after .* tokens/s, length\)", running.seen)
    assert re.search(r"^0 +0:\d.*\n1 +\d:6 ", running.seen, re.MULTILINE)
    assert not (running.state / "platform.json").exists()


def test_plan_of_llama_2_13b() -> None:
    result = invoke("plan", "--model", LLAMA, "--stages", "4", "--conversations", "64")
    assert result.exit_code == 0
    assert "cut: 0:10,10:20,20:30,30:40" in result.output
    assert re.search(r"^0 +0:10 +6\.2 GiB +25% +200\.0 KiB +800\.0 MiB +10\.0 KiB$", result.output, re.MULTILINE)
    assert "a hop carries 10240 bytes per token" in result.output
    asked = "replicas for 64 conversations in micro-batches of at most 8, 1.4 in flight for each pod, at most 10"
    assert f"{asked}: stage 0: 2, stage 1: 2, stage 2: 2, stage 3: 2" in result.output


def test_plan_of_a_gguf_file() -> None:
    result = invoke("plan", "--model", str(default_model_gguf()))
    assert "cut: 0:8,8:23,23:30\nweights: 120.7 MiB in all, as q4;" in result.output, result.output


@pytest.mark.parametrize(
    ("dtype", "lost", "rows"),
    [
        (
            "kept",
            "lost: nothing",
            [r"embed_tokens\.weight +1 +Q8_0 +Q8_0 +28\.7 MiB", r"q_proj\.weight +30 +Q4_1 +Q4_1 +5\.9 MiB"],
        ),
        (
            "q4",
            "lost: nothing",
            [r"embed_tokens\.weight +1 +Q8_0 +Q8_0 +28\.7 MiB", r"layers\.N\.mlp\.up_proj\.weight +30 +Q4_1 +q4"],
        ),
    ],
)
def test_a_dry_run_of_push_names_what_would_be_published(dtype: str, lost: str, rows: list[str]) -> None:
    result = invoke("push", str(default_model_gguf()), "--name", "tiny", "--dtype", dtype, "--dry-run")
    assert result.exit_code == 0, result.output
    words = [
        f"tiny as {dtype}: llama, 30 layers",
        "with a chat template",
        lost,
        "reading and converting: about",
        "each of 30 layers",
    ]
    for each in words:
        assert each in result.output
    for row in rows:
        assert re.search(row, result.output), result.output


def test_a_dry_run_of_push_names_what_is_not_published(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "llama", add=lambda writer: writer.add_uint32("llama.nextn_predict_layers", 1))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    result = invoke("push", str(path), "--name", "x", "--dtype", "float32", "--dry-run", "--tokenizer", str(folder))
    assert "lost: 1 layers that predict further tokens" in result.output, result.output


def test_push_for_a_fleet_takes_the_models_of_its_members(tmp_path: Path) -> None:
    members = [member_document("code", model={"name": "code", "dtype": "q4"}), member_document("draw")]
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(fleet_document(members=members)))
    push = ["push", "--spec", str(tmp_path / "fleet.yaml"), "--dry-run"]
    one = invoke(*push, "--name", "code", str(default_model_gguf()))
    assert [line.split(":")[0] for line in one.output.splitlines() if ": llama, " in line] == ["code as q4"]
    for more in ([str(default_model_gguf())], ["--name", "other", str(default_model_gguf())]):
        assert "--name must be a model of the fleet; its members have code, draw" in invoke(*push, *more).output
    assert "code is not published as q4; name its SOURCE" in invoke(*push).output


def test_plan_shows_stage_overrides_of_a_spec(tmp_path: Path) -> None:
    spec = yaml.safe_load((Path(LLAMA) / "pipeline.yaml").read_text())
    large = {"gpu": 0, "memory": "24Gi"}
    large_first = {"stage": 0, "device": "cpu", "resources": large, "autoscaling": {"max_scale": 1, "target": 4}}
    spec["stage_overrides"] = [large_first | {"pod": {"node_selector": {"pool": "large"}}}]
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(spec))
    result = invoke("plan", str(path), "--model", LLAMA, "--conversations", "64")
    assert result.exit_code == 0, result.output
    line = r"^stage 0 +4 +24Gi +14\.5 GiB +6Gi +31457 +cpu +0-1 +4 +pool=large$"
    assert re.search(line, result.output, re.MULTILINE), result.output
    assert re.search(r"^stage 1 +4 +16Gi +6Gi +31457 +1 +cuda +0-4 +2$", result.output, re.MULTILINE)
    assert re.search(r"^gateway +500m +512Mi +cpu +1-3 +100$", result.output, re.MULTILINE)
    assert "2.8/1.4/1.4/1.4 in flight for each pod, at most 1/4/4/4: stage 0: 1, stage 1: 2" in result.output
    large["memory"] = "8Gi"
    path.write_text(yaml.safe_dump(spec))
    refused = invoke("plan", str(path), "--model", LLAMA)
    assert refused.exit_code == 1
    assert "Error: $.stage.resources.memory: stage 0 has 8Gi and needs 14" in refused.output
    assert re.search(r"^stage 0 ", refused.output, re.MULTILINE), "the table comes first"


def test_plan_warns_of_slow_layers(tmp_path: Path) -> None:
    config = json.loads((Path(LLAMA) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 81}))
    slow = invoke("plan", "--model", str(tmp_path), "--dtype", "bfloat16").output
    assert "on CPUs layers do not run in C, which is slower: head_dim 81 is odd" in slow
    for dtype in ("bfloat16", "int8"):
        assert "slower" not in invoke("plan", "--model", LLAMA, "--dtype", dtype).output


def test_plan_refuses_int8_if_no_stage_would_run_it(tmp_path: Path) -> None:
    config = json.loads((Path(LLAMA) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "quick_gelu"}))
    refused = invoke("plan", "--model", str(tmp_path), "--dtype", "int8")
    assert refused.exit_code == 1
    assert refused.output.startswith("Error: no stage would run it in int8: the lean layers do not run activation 'quick_gelu'")
    assert invoke("plan", "--model", str(tmp_path), "--dtype", "bfloat16").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--model", LLAMA, "--stages", "41"), "41 stages requested, but llama-2-13b has 40 layers; ask for at most"),
        (("plan", "--model", LLAMA, "--cut", "0:10,20:40"), "group 20:40 must begin with layer 10"),
        (("ask", "http://127.0.0.1:9", "hi"), "no connection"),
    ],
)
def test_failures_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1
    (line,) = result.output.strip().splitlines()
    assert line.startswith("Error: ")
    assert message in line


@pytest.mark.slow
def test_failures_with_a_folder_are_one_line(tmp_path: Path) -> None:
    state = ("--state", str(tmp_path / "state"))
    nothing = invoke("status", *state)
    assert "nothing runs here" in nothing.output
    unknown = invoke("plan", "--model", "nobody", *state)
    assert "not published as bfloat16" in unknown.output
    keys = invoke("push", LLAMA, "--store-endpoint", "http://127.0.0.1:9")
    assert (keys.exit_code, "set AWS_ACCESS_KEY_ID" in keys.output) == (2, True)
    (tmp_path / "bad.yaml").write_text("name: [")
    bad = invoke("render", str(tmp_path / "bad.yaml"))
    assert "bad.yaml: cannot be read as YAML" in bad.output
    assert {result.exit_code for result in (nothing, unknown, bad)} == {1}


def test_every_command_has_an_example() -> None:
    listed = invoke("--help").output
    for command in ("run", "ask", "plan", "push", "render", "status"):
        assert re.search(rf"^  {command} ", listed, re.MULTILINE)
        assert f"python -m knative {command}" in invoke(command, "--help").output


def test_help_imports_no_heavy_library() -> None:
    code = "import sys, knative.__main__; sys.exit(any(m in sys.modules for m in ('torch', 'boto3', 'aiohttp', 'kubernetes')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "asked"), [("Who?", True), ("I am.", True), ("The capital of France is", False), ("«是吗？»", False)]
)
def test_a_prompt_that_ends_like_a_sentence_is_a_question(text: str, asked: bool) -> None:
    assert is_question(text) is asked
