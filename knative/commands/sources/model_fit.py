"""What suits a model on this machine: the dtype that `run` takes when none is named, and whether running it takes torch."""

from collections.abc import Mapping
from typing import Any

from functions.stage.native.limits import obstacle
from storage.checkpoints.checkpoint import Checkpoint
from storage.checkpoints.llama_config import LlamaConfig, UnsupportedConfig
from storage.models.checks import is_layer_matrix
from storage.models.model_repository import Dtype


def best_dtype(checkpoint: Checkpoint) -> Dtype:
    """The smallest that loses nothing the checkpoint has: q4 where all of its layers are in those four bits, int8 where they
    are quantized otherwise, else bfloat16. docs/trying.md says it with numbers."""
    matrices = [tensor for name, tensor in checkpoint.tensors.items() if is_layer_matrix(name, tensor.shape)]
    candidates: list[Dtype] = []
    if matrices and all(tensor.read_four_bits is not None for tensor in matrices):
        candidates.append("q4")
    if matrices and all(tensor.quantized for tensor in matrices):
        candidates.append("int8")
    return next((dtype for dtype in candidates if torch_needed(checkpoint.config, dtype) is None), "bfloat16")


def torch_needed(config: Mapping[str, Any], dtype: str) -> str | None:
    """config: a config.json. Why its layers do not run in C; None: they do, and neither torch nor transformers is needed."""
    try:
        model = LlamaConfig.from_dict(config)
    except UnsupportedConfig as error:
        return str(error)
    return obstacle(dtype, "cpu", {"head_dim": model.head_dim})
