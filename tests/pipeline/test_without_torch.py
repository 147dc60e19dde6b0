"""A pipeline of native stages as processes: none of them loads torch or transformers, be they installed or not."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from storage.models.model_repository import Dtype
from tests.support.functions.functions import FunctionProcess, gateway_environment, stage_environment
from tests.support.functions.streams import tokens_of
from tests.support.house.without import HEAVY, refusal
from tests.support.storage.published import CUT, Published, published_model

NEW_TOKENS: Final = 12
IDLE_BYTES: Final = 90 * 2**20  # of an idle native stage; the tiny model's weights are next to nothing
FUNCTION: Final = """
import os, sys
from functions.__main__ import main
status = main([], os.environ)
print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
sys.stderr.flush()
os._exit(status)
"""
PROMPT: Final = "The capital of France is"


def function(environ: dict[str, str], *, installed: bool) -> FunctionProcess:
    """`python -m functions`, which says at its end what it has imported."""
    return FunctionProcess(environ, ("-c", FUNCTION if installed else refusal(HEAVY) + FUNCTION))


def loaded(process: FunctionProcess) -> set[str]:
    assert process.stop() == 0, process.log
    (line,) = (line for line in process.log.splitlines() if line.startswith("loaded: "))
    return set(line.split()[1:])


@pytest.mark.parametrize(("installed", "family"), [(True, "llama"), (False, "gemma3n_text")])
def test_a_pipeline_answers_with_the_whole_models_tokens_and_loads_no_torch(
    published: Published, installed: bool, family: str, tmp_path: Path
) -> None:
    """Llama, and a model with several hidden states of a token, inputs of each layer and shared keys and values."""
    with ExitStack() as stack:
        model = published if family == "llama" else stack.enter_context(published_model(tmp_path, family=family))
        wanted = model.expected(PROMPT, NEW_TOKENS)
        environs = [stage_environment(model, group) for group in range(len(CUT))]
        stages = [stack.enter_context(function(environ, installed=installed)) for environ in environs]
        urls = [stage.wait_ready().url for stage in stages]
        gateway = stack.enter_context(function(gateway_environment(model, urls), installed=installed))
        assert tokens_of(gateway.wait_ready().url, PROMPT, NEW_TOKENS) == wanted
        for process in (*stages, gateway):
            assert "functions" in (modules := loaded(process))
            assert not modules.intersection(HEAVY)


@pytest.mark.parametrize(
    "dtype", [pytest.param("bfloat16", marks=pytest.mark.wide), pytest.param("int8", marks=pytest.mark.wide), "q4"]
)
def test_first_middle_and_last_stage_run_a_step_in_every_native_dtype(dtype: Dtype, tmp_path: Path) -> None:
    """A stage is ready after its first step."""
    with published_model(tmp_path, dtype) as published, ExitStack() as stack:
        environs = [stage_environment(published, group) for group in range(len(CUT))]
        stages = [stack.enter_context(function(environ, installed=False)) for environ in environs]
        for stage in stages:
            assert str(stage.wait_ready().get("/readyz")[1]["layers_run_by"]).startswith("C, ")
        for stage in stages:
            assert not loaded(stage).intersection(HEAVY)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_idle_native_stage_takes_little_memory_beside_its_weights(published: Published) -> None:
    with FunctionProcess(stage_environment(published, 1)) as stage:
        stage.wait_ready()
        with open(f"/proc/{stage.process.pid}/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert resident <= IDLE_BYTES


def test_a_stage_that_needs_torch_says_for_what_and_what_to_install(published: Published) -> None:
    environ = stage_environment(published, 1, LAMINA_LAYER_GROUP="llama")
    with function(environ, installed=False) as stage:
        assert stage.wait_end() == 1
    assert "a llama model in float32 on cpu takes torch, which is not installed here" in stage.log
    assert "pip install -r requirements.txt, or the image's target `full`" in stage.log
