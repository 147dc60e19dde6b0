"""A publication of a model that nobody downloads: its shape and sizes, with the tokenizer of the default model and no weights.

The stages that read it emulate their devices, so nothing asks for the objects; their sizes are what a pod's start waits for.
"""

import hashlib
from typing import Final

import msgspec
from rich.console import Console

from bench.evaluation.setting import Setting
from knative.commands.local_pipeline import ensure_published
from storage.checkpoints.safetensors_format import ALIGNMENT, TensorSpan
from storage.models.model_repository import (
    PART_BYTES,
    ModelManifest,
    StoredFile,
    StoredObject,
    encode_manifest,
    manifest_key,
    object_names,
)
from storage.store.object_store import ObjectStore

_PUBLICATION: Final = "emulated"
_CONFIG: Final = "config.json"


def publish_emulated(store: ObjectStore, setting: Setting) -> ModelManifest:
    """Writes a manifest and a config.json. The vocabulary is the tokenizer's. Raises a StorageError."""
    base = ensure_published(store, None, setting.dtype, Console(quiet=True))
    config = msgspec.json.encode({**setting.config, "vocab_size": base.vocab_size})
    key = f"models/{setting.model}/{setting.dtype}/{_PUBLICATION}/{_CONFIG}"
    store.put(key, config)
    shape = setting.shape
    sizes = [shape.embedding_bytes, *shape.layer_bytes, shape.head_bytes]
    manifest = msgspec.structs.replace(
        base,
        name=setting.model,
        publication=_PUBLICATION,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        context_length=setting.context_tokens,
        tied=False,
        objects={
            name: _object(f"models/{setting.model}/{name}", name, size)
            for name, size in zip(object_names(shape.num_layers), sizes, strict=True)
        },
        files={**base.files, _CONFIG: StoredFile(key, len(config), hashlib.sha256(config).hexdigest())},
    )
    store.put(manifest_key(setting.model, setting.dtype), encode_manifest(manifest))
    return manifest


def _object(key: str, name: str, size: int) -> StoredObject:
    size -= size % ALIGNMENT
    tensor = TensorSpan("U8", (size - ALIGNMENT,), ALIGNMENT, size)
    return StoredObject(key, size, PART_BYTES, ("0" * 64,) * -(-size // PART_BYTES), {name: tensor})
