"""Reads from a checkpoint's folder how its model makes vectors or scores of texts.

The folder says so in `modules.json` and the folders of its modules, which sentence-transformers writes, or by the class
`…ForSequenceClassification`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec

from storage.checkpoints.checkpoint import Checkpoint, SourceTensor
from storage.checkpoints.decoder import EMBEDDER_KEY
from storage.checkpoints.hugging_face_folder import folder_tensors, read_json, read_json_as
from storage.errors import ArchitectureUnsupported, CheckpointInvalid
from storage.models.embedder import CLASSIFIER, Activation, Dense, Embedder, Pooled

_MODULES: Final = "modules.json"
_ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Tanh": "tanh",
}
_POOLINGS: Final[Mapping[str, Pooled]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "mean": "mean",
    "lasttoken": "last",
}


def with_embedder(folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Adds the description and the tensors of an embedder to a folder's checkpoint.

    Returns the checkpoint unchanged if the model generates tokens. Raises CheckpointInvalid, and ArchitectureUnsupported for
    modules, pooling or heads that no stage runs.
    """
    config = checkpoint.config
    architecture = str((config.get("architectures") or [""])[0])
    classifies = architecture.endswith("ForSequenceClassification")
    without_head = architecture.endswith("Model") and not architecture.endswith("HeadModel")
    if not classifies and not without_head and not (folder / _MODULES).is_file():
        return checkpoint
    tensors = dict(checkpoint.tensors)
    embedder = _classifier(architecture, tensors) if classifies else _embedder(folder, config, tensors)
    embedder = msgspec.structs.replace(embedder, bidirectional=bool(config.get("use_bidirectional_attention")))
    changed = {**config, EMBEDDER_KEY: msgspec.to_builtins(embedder)}
    if architecture.endswith("ForCausalLM"):  # whose head is not used
        changed["architectures"] = [architecture.removesuffix("ForCausalLM") + "Model"]
    return replace(checkpoint, config=changed, tensors=tensors)


def _classifier(architecture: str, tensors: Mapping[str, SourceTensor]) -> Embedder:
    if CLASSIFIER not in tensors:
        raise CheckpointInvalid(f"the checkpoint of a {architecture} has no {CLASSIFIER}; is a shard missing?")
    labels = tensors[CLASSIFIER].shape[0]
    if labels != 1:
        raise ArchitectureUnsupported(f"a {architecture} with {labels} labels is not supported: a score is one number")
    return Embedder(pooling="last", size=1, normalized=False, classifies=True)


def _embedder(folder: Path, config: Mapping[str, Any], tensors: dict[str, SourceTensor]) -> Embedder:
    """Reads the modules of a folder, and adds the tensors of dense modules to `tensors`."""
    pooling: Pooled = "last"  # as vLLM has it, of a checkpoint that does not say
    normalized, max_tokens = True, None
    dense: list[Dense] = []
    if (folder / _MODULES).is_file():
        normalized = False
        for module in read_json_as(folder / _MODULES, list[dict[str, Any]]):
            kind, at = str(module.get("type")).rpartition(".")[2], folder / str(module.get("path") or ".")
            if at.resolve() != folder.resolve() and at.resolve().parent != folder.resolve():
                raise CheckpointInvalid(f"{folder / _MODULES} names {module.get('path')!r}, which is no folder beside it")
            if kind == "Transformer":
                if (settings := at / "sentence_bert_config.json").is_file():
                    max_tokens = read_json(settings).get("max_seq_length")
            elif kind == "Pooling":
                pooling = _pooling(at / "config.json")
            elif kind == "Dense":
                dense.append(_dense(at, tensors))
            elif kind == "Normalize":
                normalized = True
            else:
                raise ArchitectureUnsupported(f"the module {module.get('type')!r} of {folder / _MODULES} is not supported")
    size = int(config["hidden_size"])
    for layer in dense:
        if layer.ins != size:
            raise CheckpointInvalid(f"{layer.name} takes {layer.ins} numbers, and what comes before it makes {size}")
        size = layer.outs
    dimensions: tuple[int, ...] | None = tuple(config.get("matryoshka_dimensions") or ())
    if not dimensions and config.get("is_matryoshka"):
        dimensions = None
    return Embedder(
        pooling=pooling, size=size, normalized=normalized, dense=tuple(dense), max_tokens=max_tokens, dimensions=dimensions
    )


def _pooling(path: Path) -> Pooled:
    settings = read_json(path)
    named = settings.get("pooling_mode")
    modes = [named] if named else [name for name, on in settings.items() if name.startswith("pooling_mode_") and on]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ArchitectureUnsupported(f"{path} pools by {', '.join(map(str, modes)) or 'nothing'}; stages pool by mean or last")
    if settings.get("include_prompt") is False:
        raise ArchitectureUnsupported(f"{path} leaves prompts out of the pooling, which stages do not")
    return _POOLINGS[modes[0]]


def _dense(at: Path, tensors: dict[str, SourceTensor]) -> Dense:
    settings = read_json(at / "config.json")
    activation = settings.get("activation_function") or "torch.nn.modules.activation.Tanh"  # sentence-transformers' default
    if activation not in _ACTIVATIONS:
        raise ArchitectureUnsupported(f"{at / 'config.json'} has the activation {activation!r}; known are identity and tanh")
    own = dict(folder_tensors(at))
    weight = own.get("linear.weight")
    if weight is None or len(weight.shape) != 2:
        raise CheckpointInvalid(f"{at} has no matrix linear.weight; fetch the checkpoint again")
    tensors |= {f"{at.name}.{name}": tensor for name, tensor in own.items()}
    return Dense(at.name, weight.shape[1], weight.shape[0], _ACTIVATIONS[activation])
