"""Publishes PEFT folders as adapters (`adapters`), after checks against the model that they adapt.

Also changes the shares of versions, and deletes adapters.
"""

import hashlib
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import msgspec

from storage.checkpoints.checkpoint import SourceTensor
from storage.checkpoints.decoder import Decoder, adaptable, full_name, layer_shapes
from storage.checkpoints.decoder_config import decoder_of
from storage.checkpoints.decoder_families import UnsupportedConfig
from storage.checkpoints.families import part_of
from storage.checkpoints.hugging_face_folder import read_json, read_rows
from storage.checkpoints.safetensors_format import read_spans, tensor_bytes
from storage.errors import AdapterInvalid, AdapterNotPublished, ModelNotPublished
from storage.models.adapters import (
    ADAPTERS,
    MANIFEST,
    MAX_RANK,
    VERSION_DIGITS,
    AdapterManifest,
    AdapterName,
    NamedVersion,
    adapter_prefix,
    list_adapters,
    read_name,
    version_prefix,
)
from storage.models.model_repository import (
    PART_BYTES,
    ModelManifest,
    StoredObject,
    check_name,
    list_models,
    read_file,
    read_manifest,
)
from storage.models.object_writer import ObjectPlan, TargetTensor, plan_object, planned_digests, write_object

if TYPE_CHECKING:
    from storage.store.object_store import ObjectStore

_CONFIG: Final = "adapter_config.json"
_TENSORS: Final = "adapter_model.safetensors"
_OBJECT_BYTES: Final = 4 * 2**20  # an object for each layer costs a stage more than reading its neighbours' layers
_FLOATS: Final = ("F32", "BF16", "F16")
_PREFIX: Final = "base_model.model."
# Fields of an adapter_config.json that change what is computed, if they are set, and no stage computes.
_REFUSED: Final[Mapping[str, str]] = {
    "use_dora": "DoRA, which scales each row of the adapted matrix",
    "modules_to_save": "whole modules beside the low-rank matrices",
    "layer_replication": "replicated layers",
    "target_parameters": "adapted parameters that are no linear modules",
    "trainable_token_indices": "rows of the embedding",
    "alora_invocation_tokens": "aLoRA, which begins at tokens of its own",
    "use_qalora": "QALoRA, which pools its inputs",
    "lora_bias": "biases of the second matrix",
    "use_bdlora": "block-diagonal matrices",
}
_INSTEAD: Final = "train it without them, or merge it into the model (merge_and_unload of peft) and push that as another model"
T = TypeVar("T")


class _Config(msgspec.Struct):
    """The fields of an adapter_config.json that decide what is computed."""

    r: Annotated[int, msgspec.Meta(ge=1)]
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}

    def scale(self, module: str, rank: int) -> float:
        """The factor by which the product of a module's two adapter matrices is multiplied.

        rank: the rank of these matrices. Raises AdapterInvalid if the config says another.
        """
        wanted = _of_pattern(self.rank_pattern, module, self.r)
        if rank != wanted:
            raise AdapterInvalid(f"{module} has rank {rank} in {_TENSORS} and {wanted} in {_CONFIG}; which is right?")
        alpha = _of_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def plan_adapter(folder: Path, base: ModelManifest, config: Mapping[str, Any]) -> tuple[AdapterManifest, list[ObjectPlan]]:
    """Checks a PEFT folder against the model that it adapts, and plans what publishing it would write.

    base, config: manifest and config.json of the model, in any dtype. The manifest's objects have no keys yet. Raises
    AdapterInvalid, which names what was seen, or CheckpointInvalid for files that cannot be read.
    """
    adapter = _read_config(folder)
    shapes = _ModuleShapes(base, config)
    modules: dict[str, dict[str, SourceTensor]] = {}
    for name, tensor in _tensors(folder).items():
        found = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_(A|B)\.weight", name)
        if found is None:
            raise AdapterInvalid(
                f"{folder} has {name!r}; served are lora_A and lora_B of linear modules in layers, and nothing of embedding, "
                f"head or other modules: {_INSTEAD}"
            )
        # Some checkpoints leave out the prefix of names.
        module = found[1] if shapes.decoder is None else full_name(shapes.decoder, found[1])
        modules.setdefault(module, {})[found[2]] = tensor
    if not modules:
        raise AdapterInvalid(f"{folder / _TENSORS} has no lora_A")
    layers: dict[int, dict[str, TargetTensor]] = {}
    ranks, inner_names = [], set()
    for module, both in sorted(modules.items()):
        layer, inner, (outs, width) = shapes.place(module)
        if both.keys() != {"A", "B"}:
            raise AdapterInvalid(f"{module} has lora_{min(both)} and lacks the other matrix; is the file complete?")
        a, b = both["A"], both["B"]
        rank = a.shape[0] if a.shape else 0
        if (a.shape, b.shape) != ((rank, width), (outs, rank)) or not 1 <= rank <= MAX_RANK:
            seen = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
            raise AdapterInvalid(
                f"{module} has {seen}; the module of {base.name} is [{outs}, {width}], and ranks are at most {MAX_RANK}"
            )
        for which, tensor in both.items():
            if tensor.dtype not in _FLOATS:
                raise AdapterInvalid(f"{module} has lora_{which} in {tensor.dtype}; served are {', '.join(_FLOATS)}")
        scale = struct.pack("<f", adapter.scale(module, rank))
        layers.setdefault(layer, {}).update(
            {
                f"{module}.lora_A": TargetTensor(a.dtype, a.shape, a.blocks),
                f"{module}.lora_B": TargetTensor(b.dtype, b.shape, b.blocks),
                f"{module}.lora_scale": TargetTensor("F32", (), partial(iter, (memoryview(scale),))),
            }
        )
        ranks.append(rank)
        inner_names.add(inner)
    plans = [plan_object(f"from-{layer:05d}", tensors) for layer, tensors in _grouped(layers)]
    objects = {
        plan.name: StoredObject("", plan.bytes, PART_BYTES, planned_digests(plan, lambda count: None), plan.named_spans)
        for plan in plans
    }
    return AdapterManifest(rank=max(ranks), modules=tuple(sorted(inner_names)), objects=objects), plans


def _grouped(layers: Mapping[int, Mapping[str, TargetTensor]]) -> Iterator[tuple[int, dict[str, TargetTensor]]]:
    """Groups neighbouring layers, up to _OBJECT_BYTES. Yields the number of the first layer and the tensors of each group."""
    first, grouped, size = -1, dict[str, TargetTensor](), 0
    for layer, tensors in sorted(layers.items()):
        own = sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in tensors.values())
        if grouped and size + own > _OBJECT_BYTES:
            yield first, grouped
            grouped = {}
        if not grouped:
            first, size = layer, 0
        grouped |= tensors
        size += own
    yield first, grouped


def publish_adapter(store: "ObjectStore", model: str, name: str, folder: Path, *, share: int = 100) -> NamedVersion:
    """Publishes a PEFT folder as a version of the adapter `name` of a model, and returns the version.

    share: percent of the requests for `name` that get this version. The version that had the largest share before gets the
    rest. All checks come before the first upload. Raises ValueError for an invalid name, and ModelNotPublished, AdapterInvalid
    or another StorageError.
    """
    check_name(name, "adapter")
    prefix = adapter_prefix(model)
    published = list_models(store)
    base = next((read_manifest(store, model, dtype) for found, dtype in published if found == model), None)
    if base is None:
        known = ", ".join(sorted({found for found, _ in published})) or "none"
        raise ModelNotPublished(f"model {model!r} is not published (published: {known}); push it before its adapters")
    manifest, plans = plan_adapter(folder, base, msgspec.json.decode(read_file(store, base, "config.json")))
    version = hashlib.sha256(msgspec.json.encode(manifest, order="sorted")).hexdigest()[:VERSION_DIGITS]
    objects = {}
    for plan in plans:
        key = f"{version_prefix(model, version)}{plan.name}.safetensors"
        objects[plan.name] = write_object(store, key, plan, lambda count: None)
        if objects[plan.name].digest != manifest.objects[plan.name].digest:
            raise AdapterInvalid(f"{folder} changed while it was published; publish it again when nothing writes to it")
    written = msgspec.structs.replace(manifest, objects=objects)
    store.put(f"{version_prefix(model, version)}{MANIFEST}", msgspec.json.encode(written))
    own = NamedVersion(version, share, manifest.rank, manifest.bytes)
    try:
        others = [each for each in read_name(store, model, name).versions if each.version != version]
    except AdapterNotPublished:
        others = []
    _write_name(store, f"{prefix}names/{name}.json", _shared(others, own))
    return own


def set_share(store: "ObjectStore", model: str, name: str, version: str, share: int) -> AdapterName:
    """Changes the share of a published version of `name`. Of the other versions, the one with the largest share gets the rest.

    version: its digits, or the first of them. Raises AdapterNotPublished.
    """
    versions = read_name(store, model, name).versions
    chosen = [each for each in versions if each.version.startswith(version)]
    if len(chosen) != 1:
        raise AdapterNotPublished(
            f"{model}:{name} has {len(chosen)} versions that begin with {version!r}; it has "
            + ", ".join(each.version for each in versions)
        )
    own = msgspec.structs.replace(chosen[0], share=share)
    changed = _shared([each for each in versions if each.version != own.version], own)
    _write_name(store, f"{adapter_prefix(model)}names/{name}.json", changed)
    return changed


def delete_adapter(store: "ObjectStore", model: str, name: str) -> None:
    """Deletes a name of an adapter, and those of its versions that no other name of the model has.

    Raises AdapterNotPublished.
    """
    doomed = {each.version for each in read_name(store, model, name).versions}
    store.delete(f"{adapter_prefix(model)}names/{name}.json")
    for other in list_adapters(store, model):
        doomed -= {each.version for each in read_name(store, model, other).versions}
    for version in doomed:
        # The manifest first: a stage that begins to load the version finds nothing, and not a part.
        keys = [item.key for item in store.list(version_prefix(model, version))]
        for key in sorted(keys, key=lambda key: not key.endswith(MANIFEST)):
            store.delete(key)


def adapted_models(store: "ObjectStore") -> list[str]:
    """The names of the models that have adapters, sorted."""
    return sorted({item.key.removeprefix(ADAPTERS).partition("/")[0] for item in store.list(ADAPTERS)})


def _shared(others: Sequence[NamedVersion], own: NamedVersion) -> AdapterName:
    """The versions of a name with new shares: `own` keeps its share, and the largest of `others` gets the rest.

    If there are no others, `own` gets all requests.
    """
    if not others:
        return AdapterName((msgspec.structs.replace(own, share=100),))
    largest = max(others, key=lambda each: each.share)
    rest = [msgspec.structs.replace(each, share=100 - own.share if each is largest else 0) for each in others]
    return AdapterName((*rest, own))


def _write_name(store: "ObjectStore", key: str, name: AdapterName) -> None:
    store.put(key, msgspec.json.format(msgspec.json.encode(name), indent=1))


def _read_config(folder: Path) -> _Config:
    """Reads adapter_config.json. Raises AdapterInvalid for a kind of adapter, or for options, that no stage computes."""
    if not (folder / _CONFIG).is_file():
        raise AdapterInvalid(f"{folder} has no {_CONFIG}; name the folder that save_pretrained of peft wrote")
    found = read_json(folder / _CONFIG)
    if found.get("peft_type", "LORA") != "LORA":
        raise AdapterInvalid(f"{folder / _CONFIG} has peft_type {found['peft_type']!r}; served is LORA")
    for field, what in _REFUSED.items():
        if found.get(field):
            seen = f"{folder / _CONFIG} has {field} {found[field]!r}: {what}, which no stage computes"
            raise AdapterInvalid(f"{seen}; {_INSTEAD}")
    if found.get("bias", "none") != "none":
        raise AdapterInvalid(f"{folder / _CONFIG} has bias {found['bias']!r}: trained biases, which no stage adds; {_INSTEAD}")
    try:
        return msgspec.convert(found, type=_Config)
    except msgspec.ValidationError as error:
        raise AdapterInvalid(f"{folder / _CONFIG} cannot be read: {error}") from error


def _of_pattern(pattern: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first key that the module's name is or ends with, as peft.utils.get_pattern_key finds it."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _tensors(folder: Path) -> dict[str, SourceTensor]:
    path = folder / _TENSORS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        seen = "adapter_model.bin, a pickle, which can run code when read and is not" if pickled else "no such file"
        raise AdapterInvalid(f"{folder} has {seen}; save the adapter as {_TENSORS} (save_pretrained writes it)")
    return {
        name: SourceTensor(span.dtype, span.shape, partial(read_rows, path, span)) for name, span in read_spans(path).items()
    }


class _ModuleShapes:
    """The shapes of linear modules in a model's layers, from its description or, if it has none, from its manifest."""

    def __init__(self, base: ModelManifest, config: Mapping[str, Any]) -> None:
        self._base = base
        self._spans = {name: span for stored in base.objects.values() for name, span in stored.tensors.items()}
        self.decoder: Decoder | None = None
        with suppress(UnsupportedConfig):
            self.decoder = decoder_of(config)
        self._shapes = [] if self.decoder is None else [layer_shapes(self.decoder, kind) for kind in self.decoder.kinds]

    def place(self, module: str) -> tuple[int, str, tuple[int, int]]:
        """Finds the layer of a module, its name without the layer's prefix, and its shape [outputs, inputs].

        Raises AdapterInvalid.
        """
        layer, found = part_of(f"{module}.weight"), re.fullmatch(r"(.*\.\d+)\.(.+)", module)
        if not isinstance(layer, int) or found is None:
            raise AdapterInvalid(f"{module} is no module in a layer; adapters of embedding and head are not served")
        if layer >= self._base.num_layers:
            raise AdapterInvalid(f"{module} is in layer {layer}, and {self._base.name} has {self._base.num_layers} layers")
        inner = found[2]
        if self.decoder is None:
            span = self._spans.get(f"{module}.weight")
            shape = None if span is None else span.shape
        else:
            kind, names = self.decoder.order[layer], self.decoder.names
            shape = self._shapes[kind].get(f"{inner}.weight") if found[1] == f"{names.layers}.{layer}" else None
            if shape is not None and inner not in (allowed := adaptable(self.decoder, self.decoder.kinds[kind])):
                raise AdapterInvalid(
                    f"{module} is part of {_part_of_layer(self.decoder, kind, inner)}, to which stages of {self._base.name} "
                    f"add no adapter; in this layer they add to {', '.join(sorted(allowed)) or 'nothing'}: train it with these "
                    "as target_modules"
                )
            shape = shape[::-1] if shape and names.transposed else shape
        if shape is None or len(shape) != 2:
            raise AdapterInvalid(
                f"{module} is no linear module of {self._base.name}, a {self._base.model_type!r}; was the adapter trained on "
                "another model?"
            )
        return layer, inner, (shape[0], shape[1])


def _part_of_layer(model: Decoder, kind: int, inner: str) -> str:
    """Names the part of a layer that has a given matrix and takes no adapters. inner: the matrix's name in the layer."""
    names, attention = model.names, model.kinds[kind].attention
    if names.recurrent and inner.startswith(f"{names.recurrent}."):
        return "a recurrent mixer"
    latents = (*names.qkv, names.query_down, names.query_up, names.kv_down, names.kv_up, names.out)
    if attention is not None and attention.latent is not None and inner in latents:
        return "latent attention"
    if inner in (names.input_gate, names.input_out):
        return "the inputs that each layer gets from token ids"
    if inner in (names.stream_router, names.predict, names.correct, names.narrow_beside, names.widen_beside):
        return "the streams of hidden states"
    return "a mixture of experts"
