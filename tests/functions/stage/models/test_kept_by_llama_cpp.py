"""Models that llama-quantize made: as they are published, they compute what llama.cpp computes of the same file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers.utils import logging

from bench.stage.perplexity import stages
from functions.stage.models.layer_group import Segment
from storage.checkpoints.checkpoint import Checkpoint
from storage.checkpoints.gguf_checkpoint import open_gguf
from storage.models.model_repository import Dtype
from tests.support.functions.block_models import SIZES
from tests.support.storage import convert_to_gguf, llama_cpp, tiny_models

PROMPT = list(range(3, 123))
# What llama-quantize is asked for → formats that the file must have, since it mixes them.
FILES = {
    "Q4_K_M": {"Q4_K", "Q6_K"},
    "Q5_K_M": {"Q5_K", "Q6_K"},
    "Q3_K_M": {"Q3_K", "Q5_K"},
    "Q2_K": {"Q2_K", "Q3_K"},
    "Q6_K": {"Q6_K"},
    "IQ4_XS": {"IQ4_XS"},
    "IQ4_NL": {"IQ4_NL"},
    "Q4_0": {"Q4_0"},
    "Q5_1": {"Q5_1"},
    "Q8_0": {"Q8_0"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file in float32 of a model whose widths are multiples of 256."""
    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("quantized") / "llama"
    tiny_models.whole_model("llama", num_hidden_layers=4, **SIZES).save_pretrained(folder)
    (folder / convert_to_gguf.CHANGES).write_text(json.dumps({}))
    command = [sys.executable, convert_to_gguf.__file__, str(llama_cpp.sources().resolve()), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder.with_suffix(".gguf")


def our_logits(checkpoint: Checkpoint, dtype: Dtype) -> NDArray[np.float32]:
    hidden: Any = np.array(PROMPT)
    groups = stages(checkpoint, dtype)
    for group in groups:
        handle = group.kv.reserve(len(PROMPT))
        hidden = group.forward(hidden, [Segment(handle, 0, len(PROMPT))])
    return groups[-1].logits(hidden)


def divergence(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Mean Kullback-Leibler divergence of predictions, in nats."""
    p, q = (each.astype(np.float64) - np.logaddexp.reduce(each.astype(np.float64), axis=1)[:, None] for each in (wanted, found))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", FILES)
def test_a_quantized_file_computes_what_llama_cpp_computes_of_it(name: str, whole: Path) -> None:
    path = whole.with_name(f"{name}.gguf")
    subprocess.run([llama_cpp.program("llama-quantize"), whole, path, name, "1"], check=True, capture_output=True)
    checkpoint = open_gguf(path, tokenizer={})
    assert {tensor.stored_as for tensor in checkpoint.tensors.values()} >= FILES[name]
    exact, ours, theirs = our_logits(checkpoint, "float32"), our_logits(checkpoint, "kept"), llama_cpp.logits(path, PROMPT)
    ours_lost, theirs_lost, apart = divergence(ours, exact), divergence(theirs, exact), divergence(ours, theirs)
    print(f"{name}: ours {ours_lost:.6f}, llama.cpp's {theirs_lost:.6f}, apart {apart:.6f}")
    assert ours_lost < 1.5 * theirs_lost
    assert apart < 2.5 * theirs_lost
