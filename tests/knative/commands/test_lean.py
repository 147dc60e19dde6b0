"""The command line without torch and transformers, and the models that need them."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Kind
from rich.console import Console

from functions.stage.native.limits import DTYPES
from knative.__main__ import _COMMANDS, main
from knative.commands.local_pipeline import ensure_published
from knative.commands.model_choice import best_dtype, torch_needed
from storage.checkpoints.model_source import open_checkpoint
from storage.models.publisher import publish
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from tests.storage.checkpoints.test_gguf_families import write_gguf
from tests.support.house.without import HEAVY, run_without
from tests.support.storage import tiny_models
from tests.support.storage.storage import default_model_gguf

EVERY_HELP = """
from knative.__main__ import _COMMANDS, main
for command in _COMMANDS:
    main([command, "--help"], prog_name="knative", standalone_mode=False)
"""


def test_no_command_imports_torch(tmp_path: Path) -> None:
    done = run_without(HEAVY, tmp_path, "-c", EVERY_HELP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: knative") == len(_COMMANDS)


def test_the_default_model_answers(tmp_path: Path) -> None:
    """Publishing, platform, gateway and stages run in processes without torch."""
    arguments = ("--once", "--port", "0", "--prompt", "The capital of France is", "--max-tokens", "2")
    done = run_without(HEAVY, tmp_path, "-m", "knative", "run", *arguments, "--state", str(tmp_path / "state"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n Paris" in done.stdout
    gateway, *stages = sorted((tmp_path / "state" / "logs").glob("lamina-*.log"), key=lambda log: "-s" in log.name)
    assert len(stages) >= 3, gateway


def needed(*arguments: str) -> tuple[str, str]:
    result = CliRunner().invoke(main, ["requirements", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout.strip(), result.stderr.strip()


def test_the_default_model_needs_no_torch() -> None:
    assert needed() == ("", "")
    for dtype in DTYPES:
        assert needed("--dtype", dtype) == ("", "")
    assert needed("--dtype", "float16")[0] == "requirements-torch.txt"


@pytest.mark.parametrize("family", ["llama", "qwen3", "ministral"])
def test_llama_shaped_models_need_no_torch(family: str, tmp_path: Path) -> None:
    tiny_models.whole_model(family).save_pretrained(tmp_path)
    assert needed("--model", str(tmp_path)) == ("", "")


def test_other_models_need_torch_for_a_reason(tmp_path: Path) -> None:
    tiny_models.whole_model("gptj").save_pretrained(tmp_path)
    list_name, reason = needed("--model", str(tmp_path))
    assert list_name == "requirements-torch.txt"
    assert reason.startswith(f"{tmp_path} needs torch: Lamina's own layers do not run a 'gptj'")


def test_an_odd_head_size_needs_torch(tmp_path: Path) -> None:
    tiny_models.whole_model("llama", head_dim=8).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert torch_needed(config, "bfloat16") is None
    assert "head_dim" in str(torch_needed({**config, "head_dim": 7}, "bfloat16"))


def test_a_published_name_needs_no_list() -> None:
    assert needed("--model", "published-before") == ("", "")


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        ((Kind.Q4_0,), "q4"),
        ((Kind.Q4_1, Kind.Q4_0), "q4"),
        ((Kind.Q4_1, Kind.Q8_0), "kept"),
        ((Kind.F16, Kind.Q8_0), "kept"),
        ((Kind.F16, Kind.F16), "bfloat16"),
    ],
)
def test_the_best_dtype_is_the_smallest_that_loses_nothing(kinds: tuple[Kind, ...], dtype: str, tmp_path: Path) -> None:
    """The embedding as Q8_0, as llama.cpp writes it."""

    def kind_of(name: str) -> Kind:
        return kinds["down_proj" in name and len(kinds) > 1] if ".layers." in name else Kind.Q8_0

    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", "llama", kind_of=kind_of))
    assert best_dtype(checkpoint) == dtype


def test_run_uses_the_smallest_published_dtype_or_publishes_the_best(tmp_path: Path) -> None:
    tiny_models.whole_model("qwen2").save_pretrained(tmp_path / "tiny")
    with EmbeddedStore(tmp_path / "store") as embedded:
        store = ObjectStore(embedded.settings)
        for dtype in ("float32", "int8"):
            publish(tmp_path / "tiny", store, "known", dtype)
        console = Console(quiet=True)
        assert ensure_published(store, "known", None, console).dtype == "int8"
        assert ensure_published(store, "known", "float32", console).dtype == "float32"
        assert ensure_published(store, str(tmp_path / "tiny"), None, console).dtype == "bfloat16"


def test_an_unquantized_checkpoint_stays_in_bfloat16(tmp_path: Path) -> None:
    tiny_models.whole_model("qwen2").save_pretrained(tmp_path)
    assert best_dtype(open_checkpoint(tmp_path)) == "bfloat16"
    assert best_dtype(open_checkpoint(default_model_gguf())) == "q4"
