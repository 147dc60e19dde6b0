"""The layout of published models in a bucket, and the manifest that describes each of them.

The manifest is written last, so a published model is visible as a whole or not at all.
"""

import hashlib
import re
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Final, Literal, Protocol

import msgspec

from storage.checkpoints.safetensors_format import ALIGNMENT, MAX_DIMENSIONS, TensorSpan, tensor_bytes
from storage.errors import (
    ChecksumMismatch,
    ManifestInvalid,
    ManifestTooNew,
    ManifestTooOld,
    ModelNotPublished,
    ObjectNotFound,
)
from storage.models.embedder import Embedder

if TYPE_CHECKING:
    from storage.store.object_store import ObjectStore

MANIFEST_VERSION: Final = 2  # version 1 is refused: its checksums were xxh3, which can be forged
# Unit of ranged reads and of their checksums. Measured: 16 to 32 MiB over four connections read fastest.
PART_BYTES: Final = 16 * 2**20

Dtype = Literal["float32", "bfloat16", "float16", "int8", "q4", "kept"]
DTYPES: Final[tuple[Dtype, ...]] = ("float32", "bfloat16", "float16", "int8", "q4", "kept")

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Size = Annotated[int, msgspec.Meta(gt=0, le=2**48)]

_PUBLISHED_DTYPES: Final = frozenset({"F32", "BF16", "F16", "I8", "U8"})  # safetensors names that a loader knows
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ROOT: Final = "models/"


class StoredObject(msgspec.Struct, frozen=True):
    """One safetensors file of a published model: the embedding, one decoder layer, or the head."""

    key: str
    bytes: _Size
    part_bytes: _Size
    # BLAKE3 (hex) of each `part_bytes` of the object, the last one shorter: a cryptographic hash, fast enough for all bytes.
    parts: tuple[Digest, ...]
    tensors: dict[str, TensorSpan]  # without the fillers

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over length and checksums. Objects with equal contents have equal digests, whatever their keys."""
        return hashlib.sha256(msgspec.json.encode((self.bytes, self.part_bytes, self.parts))).hexdigest()


class StoredFile(msgspec.Struct, frozen=True):
    """A small file of a published model: config.json, tokenizer.json …"""

    key: str
    bytes: int
    sha256: Digest


class ModelManifest(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The description of one published model. `objects` has embedding, layer-00000 … and head, in this order."""

    manifest_version: int
    name: str
    dtype: Dtype
    publication: str  # folder of the objects; made from the checkpoint's fingerprint, so that a publisher can resume
    architecture: str  # the class in transformers, such as LlamaForCausalLM
    model_type: str
    num_layers: _Size
    hidden_size: _Size
    vocab_size: _Size
    num_kv_heads: _Size
    head_dim: _Size
    context_length: _Size  # tokens
    tied: bool  # the head's matrix is the embedding's, and the object `head` lacks it
    has_layer_inputs: bool = False  # every stage needs `embedding`: layers get inputs of their own from token ids
    embedder: Embedder | None = None  # the model makes vectors of texts; None: it generates tokens
    objects: dict[str, StoredObject]
    files: dict[str, StoredFile]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over the model's contents and description, but not its name and keys.

        The pipeline's fingerprint depends on it.
        """
        fields = {name: getattr(self, name) for name in self.__struct_fields__ if name not in _PLACES}
        for name in ("embedder", "has_layer_inputs"):  # older publications keep their digest
            if not fields[name]:
                del fields[name]
        contents = fields | {
            "objects": {name: (stored.digest, stored.tensors) for name, stored in self.objects.items()},
            "files": {name: stored.sha256 for name, stored in self.files.items()},
        }
        return hashlib.sha256(msgspec.json.encode(contents, order="sorted")).hexdigest()


_PLACES: Final = frozenset({"manifest_version", "name", "publication"})  # fields that do not describe the model


class Reader(Protocol):
    """Reads whole objects by key, as ObjectReader and ObjectStore do."""

    def get(self, key: str) -> bytes: ...


class _Version(msgspec.Struct):
    manifest_version: int


def layer_object(layer: int) -> str:
    """Name of the object of a layer, such as layer-00007."""
    return f"layer-{layer:05d}"


def object_names(num_layers: int) -> list[str]:
    """The names of all objects of a published model, in the order of a forward pass."""
    return ["embedding", *map(layer_object, range(num_layers)), "head"]


def check_name(name: str, what: str = "model") -> None:
    """Raises ValueError if `name` cannot be part of a key. what: says in the error what has the name."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} name {name!r}: letters, digits, '.', '_' and '-', at most 128, beginning with a letter or digit"
        )


def model_prefix(name: str, dtype: str) -> str:
    """The prefix of the keys of a model in one dtype, with a slash at its end.

    Raises ValueError for an invalid name or dtype.
    """
    check_name(name)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    return f"{_ROOT}{name}/{dtype}/"


def manifest_key(name: str, dtype: str) -> str:
    return model_prefix(name, dtype) + "manifest.json"


def read_manifest(reader: Reader, name: str, dtype: str) -> ModelManifest:
    """Reads the manifest of a model.

    Raises ModelNotPublished, ManifestTooNew, ManifestTooOld, ManifestInvalid, or the reader's errors.
    """
    key = manifest_key(name, dtype)
    try:
        data = reader.get(key)
    except ObjectNotFound as error:
        raise ModelNotPublished(f"model {name!r} is not published as {dtype}: {error}; publish it first") from error
    return decode_manifest(data, key)


def decode_manifest(data: bytes, key: str) -> ModelManifest:
    """Parses and checks a manifest. key: names the manifest in errors.

    Raises ManifestTooNew, ManifestTooOld or ManifestInvalid.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).manifest_version
        if version > MANIFEST_VERSION:
            raise ManifestTooNew(
                f"{key} has version {version} and this Lamina reads up to {MANIFEST_VERSION}; update it, or publish again"
            )
        if version < MANIFEST_VERSION:
            raise ManifestTooOld(
                f"{key} has version {version}, whose checksums do not hold against forgery, and this Lamina reads version "
                f"{MANIFEST_VERSION}; publish the model again, and render the pipeline again"
            )
        manifest = msgspec.json.decode(data, type=ModelManifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestInvalid(f"{key} cannot be read ({error}); publish the model again") from error
    _check(manifest, key)
    return manifest


def encode_manifest(manifest: ModelManifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)


def read_file(reader: Reader, manifest: ModelManifest, name: str) -> bytes:
    """Reads and verifies a file of a published model, such as tokenizer.json. Raises ObjectNotFound, ChecksumMismatch."""
    if name not in manifest.files:
        raise ObjectNotFound(
            f"model {manifest.name!r} was published without {name}; it has {', '.join(sorted(manifest.files))}. "
            "Publish a checkpoint that contains it"
        )
    stored = manifest.files[name]
    data = reader.get(stored.key)
    seen = hashlib.sha256(data).hexdigest()
    if seen != stored.sha256:
        raise ChecksumMismatch(f"{stored.key}: sha256 {stored.sha256} published, {seen} read; publish the model again")
    return data


def list_models(store: "ObjectStore") -> list[tuple[str, Dtype]]:
    """Name and dtype of every published model, sorted."""
    found = []
    for item in store.list(_ROOT):
        name, _, rest = item.key.removeprefix(_ROOT).partition("/")
        dtype, _, file = rest.partition("/")
        if file == "manifest.json" and dtype in DTYPES:
            found.append((name, dtype))
    return sorted(found)


def _check(manifest: ModelManifest, key: str) -> None:
    # The count first: with a forged number of layers their names would fill the memory.
    count = manifest.num_layers + 2
    if len(manifest.objects) != count or set(manifest.objects) != set(object_names(manifest.num_layers)):
        raise ManifestInvalid(f"{key} says {manifest.num_layers} layers but lists other objects; publish the model again")
    seen: set[str] = set()
    for name, stored in manifest.objects.items():
        reason = contradiction(stored)
        if twice := [tensor for tensor in stored.tensors if tensor in seen]:
            reason = f"has {twice[0]!r}, which another object has too"
        if reason:
            raise ManifestInvalid(f"{key}: object {name!r} {reason}; publish the model again")
        seen |= stored.tensors.keys()


def contradiction(stored: StoredObject) -> str | None:
    """Describes how a manifest's entry for an object contradicts itself, as part of a sentence. None if it does not."""
    if stored.part_bytes % ALIGNMENT or len(stored.parts) != -(-stored.bytes // stored.part_bytes):
        return f"has {stored.bytes} bytes in {len(stored.parts)} parts of {stored.part_bytes}"
    if not stored.tensors:
        return "has no tensor"
    end = min(span.start for span in stored.tensors.values())
    for name, span in sorted(stored.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if span.dtype not in _PUBLISHED_DTYPES or len(span.shape) > MAX_DIMENSIONS or min((0, *span.shape)) < 0:
            return f"has {name!r} as {span.dtype} {list(span.shape[:MAX_DIMENSIONS])}"
        fits = span.end - span.start == tensor_bytes(span.dtype, span.shape) and end <= span.start <= span.end <= stored.bytes
        if not fits or span.start <= 0 or span.start % ALIGNMENT:
            return f"has {name!r} of {span.dtype} {list(span.shape)} in bytes {span.start} to {span.end} of {stored.bytes}"
        if span.start - end >= ALIGNMENT:
            return f"has bytes {end} to {span.start}, before {name!r}, that belong to no tensor"
        end = span.end
    if stored.bytes - end >= ALIGNMENT:
        return f"has bytes {end} to {stored.bytes} that belong to no tensor"
    return None
