"""Assigns every tensor of a checkpoint to an object of the published model: embedding, a layer, or head."""

import re
from collections.abc import Mapping
from typing import Final

from storage.checkpoints.checkpoint import SourceTensor
from storage.checkpoints.families import part_of, with_shared_blocks
from storage.checkpoints.model_description import ModelDescription
from storage.errors import ArchitectureUnsupported, CheckpointInvalid
from storage.models.model_repository import layer_object, object_names

# Constants in old checkpoints that models compute for themselves.
_BUFFER: Final = re.compile(r"(?:\.rotary_emb\.inv_freq|\.masked_bias|\.(?:attn|attention)\.bias)$")
_EMBEDDING_MATRICES: Final = (
    "embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight", ".w.weight",
    ".embeddings.weight", "tokens_embed.weight",
)  # fmt: skip
_HEAD_MATRICES: Final = ("head.weight", "embed_out.weight", "output_projection.weight", "decoder.weight")

Placement = dict[str, dict[str, SourceTensor]]


def place_tensors(tensors: Mapping[str, SourceTensor], model: ModelDescription) -> Placement:
    """Maps the name of each object, in order, to its tensors. Raises CheckpointInvalid if an object would be incomplete.

    Raises ArchitectureUnsupported for a tensor that belongs to no object.
    """
    if model.num_layers > len(tensors):
        raise CheckpointInvalid(
            f"config.json says {model.num_layers} layers, and the checkpoint has {len(tensors)} tensors in all"
        )
    placed: Placement = {name: {} for name in object_names(model.num_layers)}
    for name, tensor in with_shared_blocks(tensors).items():
        if (target := _object_of(name, tensor, model)) is not None:
            placed[target][name] = tensor
    if embedding_matrix(placed) is None:
        raise CheckpointInvalid("the checkpoint has no embedding matrix, such as model.embed_tokens.weight")
    for target, members in placed.items():
        if not members and not (target == "head" and model.tied):  # GPT-1 has no norm after its layers
            raise CheckpointInvalid(
                f"no tensor of the checkpoint is for {target}; config.json says {model.num_layers} layers. Is a shard missing?"
            )
    if not model.has_head:
        placed["head"].pop(head_matrix(placed) or "", None)
    elif not model.tied and head_matrix(placed) is None:
        raise CheckpointInvalid(
            "the checkpoint has no head matrix, such as lm_head.weight, and its config.json does not tie it to the embedding"
        )
    return placed


def embedding_matrix(placed: Placement) -> str | None:
    """Name of the token embedding's matrix. None if there is none."""
    return next((name for name in placed["embedding"] if name.endswith(_EMBEDDING_MATRICES)), None)


def head_matrix(placed: Placement) -> str | None:
    """Name of the matrix that makes logits. None if the checkpoint has none and uses the embedding's."""
    return next((name for name in placed["head"] if name.endswith(_HEAD_MATRICES)), None)


def _object_of(name: str, tensor: SourceTensor, model: ModelDescription) -> str | None:
    """Name of the object to which a tensor belongs. None if the tensor is not published."""
    # A causal mask [1, 1, n, n] has the name that a projection's bias [n] has elsewhere.
    if _BUFFER.search(name) and not (name.endswith(".bias") and len(tensor.shape) < 2):
        return None
    if name in model.unused_tensors:
        return None
    part = "head" if name in model.vector_tensors else part_of(name)
    if isinstance(part, str):
        return part
    if part is not None and part < model.num_layers:
        return layer_object(part)
    if part is not None and part < model.num_layers + model.ignored_layers:
        return None
    if part is not None:
        raise CheckpointInvalid(f"the checkpoint has {name!r}, but config.json says {model.num_layers} layers; which is right?")
    raise ArchitectureUnsupported(
        f"the checkpoint of a {model.model_type!r} has {name!r}, which is neither embedding, layer nor head"
    )
