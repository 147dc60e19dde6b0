"""Tensors of checkpoints and of publications as torch has them, and their comparison to the bit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from storage.checkpoints.checkpoint import Checkpoint
from storage.loading.weight_loader import RawTensor
from tests.support.storage.storage import gguf_reader

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "U8": torch.uint8}


def as_torch(tensors: Mapping[str, RawTensor]) -> dict[str, torch.Tensor]:
    return {name: torch.frombuffer(raw.data, dtype=_DTYPES[raw.dtype]).view(raw.shape) for name, raw in tensors.items()}


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a Hugging Face folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def checkpoint_floats(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint whose blocks are float32."""
    return {
        name: torch.cat([torch.frombuffer(block, dtype=torch.float32) for block in source.blocks()]).view(source.shape)
        for name, source in checkpoint.tensors.items()
    }


def gguf_by_transformers(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """What transformers reads from the GGUF file of this checkpoint: its config, and its tensors."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint.config))
    with reading_gguf_once():
        parsed: dict[str, Any] = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    return parsed


@contextmanager
def reading_gguf_once() -> Iterator[None]:
    """transformers reads a GGUF file's metadata for each of its purposes, and makes the table of names for each module."""
    with patch("gguf.GGUFReader", gguf_reader), patch("gguf.get_tensor_name_map", cache(gguf.get_tensor_name_map)):
        yield


def assert_equal(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
