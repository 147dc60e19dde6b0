"""Publishes a checkpoint: every decoder layer, the embedding and the head as one object each, then the manifest.

Bounded memory: tensors pass through in blocks of a few MiB. Resumable: behind every finished object a fragment of the
manifest is written; the next run reads the checkpoint of it again and, where that gives the same bytes, sends nothing.
Idempotent: a checkpoint that is published already costs one manifest read and one reading of the files, whose contents alone
say so. Nothing is visible before the manifest.
"""

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Final, cast

import msgspec

from storage.checkpoints.checkpoint import Checkpoint, SourceTensor
from storage.checkpoints.model_description import ModelDescription, describe_model
from storage.checkpoints.model_source import checkpoint_fingerprint, checkpoint_state, locate, open_checkpoint
from storage.errors import CheckpointInvalid, ManifestInvalid, ModelNotPublished
from storage.models.expected_shapes import check_shapes
from storage.models.model_repository import (
    MANIFEST_VERSION,
    PART_BYTES,
    Dtype,
    ModelManifest,
    StoredFile,
    StoredObject,
    encode_manifest,
    manifest_key,
    model_prefix,
    read_manifest,
)
from storage.models.object_writer import ObjectPlan, TargetTensor, plan_object, planned_digests, write_object
from storage.models.placement import Placement, embedding_matrix, head_matrix, place_tensors
from storage.models.quantizable import check_quantizable, is_layer_matrix
from storage.store.object_store import ObjectStore

_log = logging.getLogger(__name__)

_FRAGMENT_SUFFIX: Final = ".fragment.json"


@dataclass(frozen=True, slots=True)
class PublishProgress:
    """Told after every block. Bytes are those of all objects, read or sent: what an earlier run finished is only read."""

    object: str
    done_bytes: int
    total_bytes: int


ProgressCallback = Callable[[PublishProgress], None]


def publish(
    source: str | Path,
    store: ObjectStore,
    name: str,
    dtype: str,
    *,
    progress: ProgressCallback | None = None,
    keep_wide: Collection[str] = (),
    afresh: bool = False,
) -> ModelManifest:
    """Makes a model readable under `name` and `dtype`, and returns its manifest.

    source: a Hugging Face folder, a GGUF file, or a hub id. dtype: float32, bfloat16, float16, int8 or q4.
    keep_wide: matrices, such as down_proj, that int8 and q4 leave in bfloat16.
    afresh: writes every object, also where the store seems to have it, which is what mends a damaged one.
    Raises ValueError for a name or dtype that cannot be, CheckpointInvalid or another StorageError; what was published
    before under this name stays as it was.
    """
    prefix = model_prefix(name, dtype)
    path = locate(source)
    state, contents = checkpoint_state(path), checkpoint_fingerprint(path)
    publication = _publication(contents, dtype, keep_wide)
    current = None if afresh else _current(store, name, dtype)
    if current is not None and current.publication == publication:
        _log.info("%s is published as %s in %s already", source, name, dtype)
        return current
    checkpoint = open_checkpoint(path)
    check_quantizable(checkpoint.config, dtype)
    model, placed = _settle_tie(describe_model(checkpoint.config), checkpoint)
    check_shapes(checkpoint.config, {name: tensor.shape for members in placed.values() for name, tensor in members.items()})
    if dtype == "q4":
        _tell_of_losses(source, placed)
    plans = _plans(placed, cast("Dtype", dtype), keep_wide)
    upload = _Upload(store, f"{prefix}{publication}/", plans, progress, afresh)
    objects = upload.objects()
    files = upload.files(_files(checkpoint, model))
    if checkpoint_state(path) != state and checkpoint_fingerprint(path) != contents:
        raise CheckpointInvalid(f"{path} changed while it was published; publish it again when nothing writes to it")
    manifest = _manifest(name, cast("Dtype", dtype), publication, model, objects, files)
    store.put(manifest_key(name, dtype), encode_manifest(manifest))
    upload.delete_fragments()
    return manifest


def _publication(contents: str, dtype: str, keep_wide: Collection[str]) -> str:
    """contents: the checkpoint's fingerprint. 128 bits: a folder is never shared by two checkpoints."""
    text = f"{contents} {dtype} {sorted(keep_wide)} {MANIFEST_VERSION} {PART_BYTES}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _current(store: ObjectStore, name: str, dtype: str) -> ModelManifest | None:
    try:
        return read_manifest(store, name, dtype)
    except (ModelNotPublished, ManifestInvalid):
        return None


def _settle_tie(model: ModelDescription, checkpoint: Checkpoint) -> tuple[ModelDescription, Placement]:
    """A tied checkpoint may carry the head's matrix all the same: dropped if equal, believed if not, as transformers does."""
    placed = place_tensors(checkpoint.tensors, model)
    head = head_matrix(placed)
    if not model.tied or head is None:
        return model, placed
    embedding = embedding_matrix(placed)
    if embedding and _equal(placed["embedding"][embedding], placed["head"][head]):
        del placed["head"][head]
        return model, placed
    return with_changes(model, tied=False), placed


def _equal(left: SourceTensor, right: SourceTensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return all(ours == theirs for ours, theirs in zip(left.blocks(), right.blocks(), strict=True))


def _plans(placed: Placement, dtype: Dtype, keep_wide: Collection[str]) -> list[ObjectPlan]:
    from storage.models.conversion import convert_tensor  # numpy, which only a real publication needs

    plans = []
    for name, members in placed.items():
        tensors: dict[str, TargetTensor] = {}
        for tensor_name, source in members.items():
            tensors |= convert_tensor(tensor_name, source, dtype, keep_wide)
        plans.append(plan_object(name, tensors))
    return plans


def _tell_of_losses(source: str | Path, placed: Placement) -> None:
    """Of a checkpoint that has some of its matrices in four bits."""
    matrices = [
        tensor for members in placed.values() for name, tensor in members.items() if is_layer_matrix(name, tensor.shape)
    ]
    others = sum(tensor.read_four_bits is None for tensor in matrices)
    if 0 < others < len(matrices):
        _log.warning(
            "%s: %d of %d matrices are not in four bits (Q4_0 or Q4_1) and are rounded to four anew, which costs quality",
            source,
            others,
            len(matrices),
        )


def _files(checkpoint: Checkpoint, model: ModelDescription) -> dict[str, bytes]:
    files = dict(checkpoint.files)
    if checkpoint.config.get("tie_word_embeddings", model.tied) != model.tied:
        config = dict(checkpoint.config) | {"tie_word_embeddings": model.tied}
        files["config.json"] = msgspec.json.format(msgspec.json.encode(config), indent=2)
    return files


class _Upload:
    """Writes one publication's folder, leaving out what an interrupted run has written already."""

    def __init__(
        self, store: ObjectStore, prefix: str, plans: list[ObjectPlan], progress: ProgressCallback | None, afresh: bool
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._plans = plans
        self._progress = progress
        self._done_bytes = 0
        self._total_bytes = sum(plan.bytes for plan in plans)
        self._present = {} if afresh else {item.key: item.bytes for item in store.list(prefix)}

    def objects(self) -> dict[str, StoredObject]:
        return {plan.name: self._verified(plan) or self._written(plan) for plan in self._plans}

    def files(self, files: Mapping[str, bytes]) -> dict[str, StoredFile]:
        for name, data in files.items():
            self._store.put(self._prefix + name, data)
        return {
            name: StoredFile(self._prefix + name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()
        }

    def delete_fragments(self) -> None:
        for plan in self._plans:
            self._store.delete(self._fragment_key(plan))

    def _verified(self, plan: ObjectPlan) -> StoredObject | None:
        """What an earlier run wrote, if it is what the checkpoint gives now; None: it has to be written."""
        if (stored := self._finished(plan)) is None:
            return None
        told = self._done_bytes
        if planned_digests(plan, lambda count: self._tell(plan, count)) == stored.parts:
            return stored
        self._done_bytes = told
        return None

    def _finished(self, plan: ObjectPlan) -> StoredObject | None:
        fragment_key = self._fragment_key(plan)
        if self._present.get(self._key(plan)) != plan.bytes or fragment_key not in self._present:
            return None
        try:
            stored = msgspec.json.decode(self._store.get(fragment_key), type=StoredObject)
        except msgspec.MsgspecError:
            return None
        if (stored.key, stored.bytes, stored.tensors) != (self._key(plan), plan.bytes, plan.named_spans):
            return None
        return stored

    def _written(self, plan: ObjectPlan) -> StoredObject:
        stored = write_object(self._store, self._key(plan), plan, lambda count: self._tell(plan, count))
        self._store.put(self._fragment_key(plan), msgspec.json.encode(stored))
        return stored

    def _tell(self, plan: ObjectPlan, count: int) -> None:
        self._done_bytes += count
        if self._progress:
            self._progress(PublishProgress(plan.name, self._done_bytes, self._total_bytes))

    def _key(self, plan: ObjectPlan) -> str:
        return f"{self._prefix}{plan.name}.safetensors"

    def _fragment_key(self, plan: ObjectPlan) -> str:
        return f"{self._prefix}{plan.name}{_FRAGMENT_SUFFIX}"


def _manifest(
    name: str,
    dtype: Dtype,
    publication: str,
    model: ModelDescription,
    objects: dict[str, StoredObject],
    files: dict[str, StoredFile],
) -> ModelManifest:
    return ModelManifest(
        manifest_version=MANIFEST_VERSION,
        name=name,
        dtype=dtype,
        publication=publication,
        architecture=model.architecture,
        model_type=model.model_type,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        context_length=model.context_length,
        tied=model.tied,
        objects=objects,
        files=files,
    )
