"""Publishes a checkpoint: every decoder layer, the embedding and the head as one object each, then the manifest.

Several threads make and send objects. Memory is bounded: tensors pass through in blocks of a few MiB. Publishing is resumable:
after every object, a fragment of the manifest is written. The next run reads the object's tensors again and sends nothing if
they give the same bytes. Publishing is idempotent: to publish the same contents again costs one read of the manifest and one of
the files. Readers see nothing before the manifest. The names of objects depend on the checkpoint's contents, so two
publications of one name never mix.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from dataclasses import replace as with_changes
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec
from blake3 import blake3

from storage.checkpoints.checkpoint import Checkpoint, SourceTensor
from storage.checkpoints.decoder_config import decoder_of, with_description
from storage.checkpoints.decoder_families import UnsupportedConfig
from storage.checkpoints.model_description import ModelDescription, describe_model
from storage.checkpoints.model_source import checkpoint_fingerprint, checkpoint_state, locate, open_checkpoint
from storage.errors import CheckpointInvalid, ManifestInvalid, ModelNotPublished, StorageError
from storage.models.checks import check_runnable, check_shapes, is_layer_matrix
from storage.models.embedder import embedder_in
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
from storage.models.sentence_transformers import with_embedder
from storage.store.object_store import ObjectStore

if TYPE_CHECKING:
    from storage.models.conversion import RoundingError

_log = logging.getLogger(__name__)

_MOST_THREADS: Final = 4
_THREAD_BYTES: Final = 100 * 2**20  # parts on their way, and blocks that are converted
_BASE_BYTES: Final = 150 * 2**20
_UNPUBLISHED: Final = frozenset(("ignored_layers", "has_head", "vector_tensors", "unused_tensors"))  # of a description
_FRAGMENT_SUFFIX: Final = ".fragment.json"


@dataclass(frozen=True, slots=True)
class PublishProgress:
    """The progress of publishing a model, reported after every block.

    Its bytes are those of objects that this run or an earlier one has sent.
    """

    object: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class QuantizedSource:
    """Facts about a quantized checkpoint that was published."""

    method: str  # of quantization, for people
    source_bytes: int  # of the checkpoint's files
    largest_error: float  # of a published weight, against the weight that the checkpoint stores
    largest_weight: float  # magnitude


@dataclass(frozen=True, slots=True)
class PublicationPlan:
    """What publishing a checkpoint would write."""

    checkpoint: Checkpoint
    model: ModelDescription
    objects: list[ObjectPlan]
    error: "RoundingError | None"  # filled while tensors are converted, if it was asked for or the checkpoint is quantized


CutCheck = Callable[[Mapping[str, Any]], None]  # takes a config.json; raises ArchitectureUnsupported if no stage would run it
ProgressCallback = Callable[[PublishProgress], None]
QuantizedCallback = Callable[[QuantizedSource], None]


def publish(
    source: str | Path,
    store: ObjectStore,
    name: str,
    dtype: str,
    *,
    progress: ProgressCallback | None = None,
    on_quantized: QuantizedCallback | None = None,
    afresh: bool = False,
    tokenizer: Path | None = None,
    text_only: bool = False,
    check_cut: CutCheck | None = None,
) -> ModelManifest:
    """Publishes a model under `name` and `dtype`, and returns its manifest.

    source: a Hugging Face folder, a GGUF file, or a hub id. dtype: one of DTYPES. on_quantized: called at the end, if the
    source is a quantized Hugging Face checkpoint and was not published before. afresh: writes every object, even if the store
    seems to have it; this repairs a damaged publication. tokenizer: a folder whose tokenizer is published instead of the
    source's own. text_only: publishes only the language model of a checkpoint that also processes images or sound. check_cut:
    called before anything is written, for a model that Lamina's own layers do not run; raises an error if stages cannot run it.

    Raises ValueError for an invalid name or dtype, CheckpointInvalid or another StorageError. After an error, the former
    publication under this name stays as it was.
    """
    prefix = model_prefix(name, dtype)
    path = locate(source)
    read = [path] if tokenizer is None else [path, tokenizer]
    state, contents = [*map(checkpoint_state, read)], " ".join(map(checkpoint_fingerprint, read))
    # 128 bits: two checkpoints never share a folder.
    text = f"{contents} {dtype} {MANIFEST_VERSION} {PART_BYTES}"
    publication = hashlib.sha256(text.encode()).hexdigest()[:32]
    if not afresh:
        with suppress(ModelNotPublished, ManifestInvalid):
            current = read_manifest(store, name, dtype)
            if current.publication == publication:
                _log.info("%s is published as %s in %s already", source, name, dtype)
                return current
    planned = plan_publication(path, dtype, tokenizer=tokenizer, text_only=text_only, check_cut=check_cut)
    checkpoint, model, plans, error = planned.checkpoint, planned.model, planned.objects, planned.error
    upload = _Upload(store, f"{prefix}{publication}/", plans, progress, afresh)
    try:
        objects = upload.objects()
    except StorageError as failure:
        failure.add_note(
            f"{name} as {dtype} stays as it was; when the cause is gone, the same push goes on where this one stopped."
        )
        raise
    files = dict(checkpoint.files)
    config = with_description(checkpoint.config)
    if checkpoint.config.get("tie_word_embeddings", model.tied) != model.tied:
        config = with_description({**checkpoint.config, "tie_word_embeddings": model.tied})
    if config is not checkpoint.config or embedder_in(config):
        files["config.json"] = msgspec.json.format(msgspec.json.encode(config), indent=2)
    stored_files = upload.files(files)
    if [*map(checkpoint_state, read)] != state and " ".join(map(checkpoint_fingerprint, read)) != contents:
        raise CheckpointInvalid(f"{path} changed while it was published; publish it again when nothing writes to it")
    described = {field: value for field, value in asdict(model).items() if field not in _UNPUBLISHED}
    manifest = ModelManifest(
        manifest_version=MANIFEST_VERSION,
        name=name,
        dtype=cast("Dtype", dtype),
        publication=publication,
        objects=objects,
        files=stored_files,
        embedder=embedder_in(config),
        **described,
    )
    store.put(manifest_key(name, dtype), encode_manifest(manifest))
    for plan in plans:
        store.delete(f"{prefix}{publication}/{plan.name}{_FRAGMENT_SUFFIX}")
    if on_quantized and error and checkpoint.quantization:
        source_bytes = sum(count for _, _, count, _, _ in state[0])
        on_quantized(QuantizedSource(checkpoint.quantization, source_bytes, error.largest, error.largest_weight))
    return manifest


def plan_publication(
    path: Path,
    dtype: str,
    *,
    tokenizer: Path | None = None,
    text_only: bool = False,
    note_losses: bool = False,
    check_cut: CutCheck | None = None,
) -> PublicationPlan:
    """Plans what `publish` would write for the checkpoint at `path`. Reads no tensor unless it must compare tied matrices.

    note_losses: if it is set, the plan has an `error` even for checkpoints that are not quantized. Raises as `publish` does.
    """
    from storage.models.conversion import RoundingError  # numpy, which only a real publication needs

    checkpoint = open_checkpoint(path, tokenizer, text_only)
    if path.is_dir() and not text_only:
        checkpoint = with_embedder(path, checkpoint)
    embedder = embedder_in(checkpoint.config)
    vector_tensors = embedder.tensors if embedder else frozenset()
    check_runnable(checkpoint.config, dtype)
    model = with_changes(describe_model(checkpoint.config), vector_tensors=vector_tensors)
    model, placed = _settle_tie(model, checkpoint)
    shapes = {name: tensor.shape for members in placed.values() for name, tensor in members.items()}
    in_float32 = vector_tensors | check_shapes(
        checkpoint.config, {name: shape for name, shape in shapes.items() if name not in vector_tensors}, dtype
    )
    if check_cut:
        try:
            decoder_of(checkpoint.config)
        except UnsupportedConfig:
            check_cut(checkpoint.config)
    if dtype == "q4":
        _warn_of_losses(path, placed)
    if dtype == "kept":
        _check_blocks(path, placed)
    error = RoundingError() if checkpoint.quantization or note_losses else None
    return PublicationPlan(checkpoint, model, plan_objects(placed, dtype, in_float32, error), error)


def plan_objects(
    placed: Placement,
    dtype: str,
    in_float32: Collection[str],
    error: "RoundingError | None" = None,
) -> list[ObjectPlan]:
    """Plans the objects of a published model. in_float32: names of tensors that are float32 whatever the `dtype`."""
    from storage.models.conversion import convert_tensor  # numpy, which only a real publication needs

    plans = []
    for object_name, members in placed.items():
        targets: dict[str, TargetTensor] = {}
        for tensor_name, tensor in members.items():
            stored_as = "float32" if tensor_name in in_float32 else dtype
            targets |= convert_tensor(tensor_name, tensor, cast("Dtype", stored_as), error)
        plans.append(plan_object(object_name, targets))
    return plans


def rehearse(plan: PublicationPlan) -> tuple[float, int]:
    """Estimates the cost of a plan. Returns the seconds that all objects take without the upload, and the most bytes of memory.

    Converts and hashes the first block of each tensor of the embedding, layer 0 and the head. This fills `plan.error`.
    """
    converted, started = 0, time.perf_counter()
    for each in (plan.objects[0], plan.objects[1], plan.objects[-1]):
        for tensor in each.tensors.values():
            for block in islice(tensor.blocks(), 1):
                blake3(block)
                converted += len(block)
    seconds = (time.perf_counter() - started) / max(1, converted) * sum(each.bytes for each in plan.objects)
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    return seconds / threads, _BASE_BYTES + threads * _THREAD_BYTES


def _settle_tie(model: ModelDescription, checkpoint: Checkpoint) -> tuple[ModelDescription, Placement]:
    """Places the tensors, and decides on the head matrix of a checkpoint whose config ties it to the embedding.

    If both matrices are equal, the head's is dropped. If not, it is used and the model counts as not tied, as in transformers.
    """
    from storage.models.expert_tensors import split_experts  # numpy, as above

    placed = place_tensors(split_experts(model.model_type, checkpoint.tensors), model)
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


def _warn_of_losses(source: str | Path, placed: Placement) -> None:
    """Warns if only some matrices of the checkpoint are in four bits, because the others lose quality in q4."""
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


def _check_blocks(source: str | Path, placed: Placement) -> None:
    """Warns of matrices in formats that no kernel reads. Raises CheckpointInvalid if the checkpoint has no blocks at all."""
    from storage.floats import FLOATS
    from storage.models.blocks import FORMATS

    tensors = [tensor for members in placed.values() for tensor in members.values()]
    matrices = [tensor for tensor in tensors if tensor.stored_as is not None and tensor.stored_as not in FLOATS]
    if not matrices:
        raise CheckpointInvalid(f"{source} has no quantized matrix, which dtype kept is for; publish it in another dtype")
    others = [
        str(each.stored_as)
        for each in matrices
        if each.read_blocks is None or len(each.shape) != 2 or each.stored_as not in FORMATS
    ]
    if others:
        _log.warning(
            "%s: %d of %d matrices are in %s, which become bfloat16: larger, and rounded to eight bits",
            source,
            len(others),
            len(matrices),
            ", ".join(sorted(set(others))),
        )


class _GivenUp(Exception):
    """Ends threads that still write objects after another object has failed."""


class _Upload:
    """Writes the objects and files of one published model, except for objects that an interrupted run has finished."""

    def __init__(
        self, store: ObjectStore, prefix: str, plans: list[ObjectPlan], progress: ProgressCallback | None, afresh: bool
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._plans = plans
        self._progress = progress
        self._lock = threading.Lock()
        self._done_bytes: dict[str, int] = {}  # by object
        self._given_up = False
        self._total_bytes = sum(plan.bytes for plan in plans)
        self._present = {} if afresh else {item.key: item.bytes for item in store.list(prefix)}

    def files(self, files: Mapping[str, bytes]) -> dict[str, StoredFile]:
        for name, data in files.items():
            self._store.put(self._prefix + name, data)
        return {
            name: StoredFile(self._prefix + name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()
        }

    def objects(self) -> dict[str, StoredObject]:
        """Writes all objects, several at a time. Returns their entries in the manifest, by name.

        After the first error no further object is begun, and objects that are being written are given up.
        """
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "publisher") as threads:
            written = {plan.name: threads.submit(self._verified_or_written, plan) for plan in self._plans}
            try:
                wait(written.values(), return_when=FIRST_EXCEPTION)
            finally:
                self._given_up = True
                threads.shutdown(cancel_futures=True)
        failed = [error for each in written.values() if not each.cancelled() and (error := each.exception())]
        for error in failed:
            if not isinstance(error, _GivenUp):
                raise error
        return {name: each.result() for name, each in written.items()}

    def _verified_or_written(self, plan: ObjectPlan) -> StoredObject:
        """Writes an object, unless an earlier run has written it and the checkpoint still gives the same bytes.

        Returns the object's entry in the manifest.
        """
        key, fragment_key = f"{self._prefix}{plan.name}.safetensors", f"{self._prefix}{plan.name}{_FRAGMENT_SUFFIX}"
        report = partial(self._report, plan.name)
        if self._present.get(key) == plan.bytes and fragment_key in self._present:
            with suppress(msgspec.MsgspecError):
                found = msgspec.json.decode(self._store.get(fragment_key), type=StoredObject)
                same_layout = (found.key, found.bytes, found.tensors) == (key, plan.bytes, plan.named_spans)
                if same_layout and planned_digests(plan, report) == found.parts:
                    return found
        with self._lock:
            self._done_bytes[plan.name] = 0
        stored = write_object(self._store, key, plan, report)
        self._store.put(fragment_key, msgspec.json.encode(stored))
        return stored

    def _report(self, name: str, count: int) -> None:
        """Adds `count` bytes to the progress of an object, and reports it. Raises _GivenUp if another object has failed."""
        with self._lock:
            if self._given_up:
                raise _GivenUp
            self._done_bytes[name] = self._done_bytes.get(name, 0) + count
            if self._progress:
                self._progress(PublishProgress(name, sum(self._done_bytes.values()), self._total_bytes))
