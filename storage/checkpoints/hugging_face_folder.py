"""Reads Hugging Face checkpoints: a folder with config.json, safetensors (one file or shards with an index) and a tokenizer.

No code in the folder is run: there is no remote code, and a pickled checkpoint is refused.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from storage.checkpoints.checkpoint import Checkpoint, SourceTensor
from storage.checkpoints.safetensors_format import TensorSpan, read_exactly, read_header, read_spans, tensor_bytes
from storage.errors import CheckpointInvalid, LibraryMissing

T = TypeVar("T")

# Python writes these numbers, which are no JSON. transformers writes them as this object.
_BARE_FLOAT: Final = re.compile(rb"(?<=[\[:,\s])(-?Infinity|NaN)(?=[\],}\s])")
_TAGGED_FLOAT: Final = rb'{"__float__": "\1"}'
_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_FILES: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja",
)  # fmt: skip
# Older checkpoints say in a file of their library how they are quantized, and not in config.json.
_QUANTIZATION_FILES: Final = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
_LANGUAGE_MODELS: Final = ("language_model", "text_model")  # names of the module with the language model of a larger one
_SLOW_TOKENIZERS: Final = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def open_folder(folder: Path, text_only: bool = False) -> Checkpoint:
    """Opens the folder of a checkpoint. Tensors are read only when they are used.

    If `text_only` is set and the model also processes images or sound, opens only its language model. Raises CheckpointInvalid,
    which names the file and what is wrong with it.
    """
    config = read_json(folder / "config.json")
    published = dict(config)
    tensors, quantization = dict(folder_tensors(folder)), None
    if settings := _quantization_config(folder, published):
        from storage.checkpoints.quantized import dequantized  # numpy, which only quantized checkpoints need here

        metadata = {key: text for path in _shards(folder) for key, text in read_header(path)[1].items()}
        tensors, quantization = dequantized(folder, settings, tensors, metadata)
    left_out: tuple[str, ...] = ()
    if text_only:
        published, tensors, left_out = _text_part(folder, published, tensors)
    files = _files(folder)
    files["config.json"] = _BARE_FLOAT.sub(_TAGGED_FLOAT, files["config.json"])
    if published.get("model_type") == "mistral" and "layer_types" in published:
        # So do transformers' Auto classes (models/auto/configuration_auto.py), and stages must not have to know it.
        published["model_type"] = "ministral"
    if published != config:
        files["config.json"] = msgspec.json.format(msgspec.json.encode(published), indent=2)
    return Checkpoint(published, files, tensors, quantization, left_out)


def _text_part(
    folder: Path, config: dict[str, Any], tensors: Mapping[str, SourceTensor]
) -> tuple[dict[str, Any], dict[str, SourceTensor], tuple[str, ...]]:
    """Extracts the language model from a larger model.

    Returns its config, its tensors (both as if saved alone), and a list for people of the modules that are left out.
    """
    text = config.get("text_config")
    if not isinstance(text, dict) or "model_type" not in text:
        raise CheckpointInvalid(f"{folder / 'config.json'} has no text_config with a model_type: publish the whole model")
    if (tied := config.get("tie_word_embeddings")) is not None:
        text = {"tie_word_embeddings": tied, **text}
    kept: dict[str, SourceTensor] = {}
    left_out: dict[str, int] = {}
    for name, tensor in tensors.items():
        modules = name.split(".")
        inner = next((module for module in modules[:2] if module in _LANGUAGE_MODELS), None)
        if inner is not None:
            modules.remove(inner)
            kept[".".join(modules)] = tensor
        elif modules[0] == "lm_head":
            kept[name] = tensor
        else:
            module = ".".join(modules[:2] if modules[0] == "model" else modules[:1])
            left_out[module] = left_out.get(module, 0) + tensor_bytes(tensor.dtype, tensor.shape)
    return text, kept, tuple(f"{module} ({count} bytes)" for module, count in left_out.items())


def _quantization_config(folder: Path, config: dict[str, Any]) -> object:
    """Removes `quantization_config` from a config.json and returns it, or reads it from a separate file.

    None if there is neither.
    """
    settings = config.pop("quantization_config", None)
    found = next((name for name in _QUANTIZATION_FILES if not settings and (folder / name).is_file()), None)
    if found is None:
        return settings
    stored = read_json(folder / found)
    return {"quant_method": _QUANTIZATION_FILES[found], **(stored.get("quantization") or stored)}


def tokenizer_folder(folder: Path) -> dict[str, bytes]:
    """Reads the files of a folder's tokenizer, chat template and end tokens, by name.

    Raises CheckpointInvalid if the folder has no tokenizer.json.
    """
    files = {name: content for name, content in _files(folder).items() if name != "config.json"}
    if "tokenizer.json" not in files:
        raise CheckpointInvalid(f"{folder} has no tokenizer.json; name a folder with the model's tokenizer")
    return files


def folder_tensors(folder: Path) -> Iterator[tuple[str, SourceTensor]]:
    """Yields name and tensor for the safetensors files of a folder. Tensors are read when they are used.

    Raises CheckpointInvalid.
    """
    for path, wanted in _shards(folder).items():
        spans = read_spans(path)
        if missing := sorted(set(wanted or ()) - set(spans)):
            raise CheckpointInvalid(f"{path} lacks {missing[0]!r}, which {_INDEX} says it has; fetch the checkpoint again")
        for name in wanted or spans:
            span = spans[name]
            yield name, SourceTensor(span.dtype, span.shape, partial(read_rows, path, span))


def read_rows(path: Path, span: TensorSpan, first: int, last: int) -> memoryview:
    """Reads the bytes of rows [first, last) of a tensor in a safetensors file. Raises CheckpointInvalid if it is too short."""
    row_bytes = tensor_bytes(span.dtype, span.shape[1:])
    view = memoryview(bytearray((last - first) * row_bytes))
    with path.open("rb", buffering=0) as file:
        read_exactly(file.fileno(), span.start + first * row_bytes, view)
    return view


def _shards(folder: Path) -> dict[Path, list[str] | None]:
    """The safetensors files of a checkpoint, each with the names of its tensors in the index; None if there is no index."""
    if (folder / _INDEX).is_file():
        return dict(_indexed_shards(folder))
    if (folder / _SINGLE).is_file():
        return {folder / _SINGLE: None}
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: None}
    if found:
        raise CheckpointInvalid(f"{folder} has {len(found)} safetensors files and no {_INDEX} that tells them apart")
    if pickles := sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)):
        raise CheckpointInvalid(
            f"{folder} has {pickles[0]}, a pickle, which can run code when read and is not; convert it to safetensors "
            "where you trust it (save_pretrained writes them)"
        )
    raise CheckpointInvalid(f"{folder} has no safetensors file; is it the folder of a checkpoint?")


def _indexed_shards(folder: Path) -> dict[Path, list[str]]:
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointInvalid(f"{folder / _INDEX} has no weight_map; fetch it again")
    shards: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        path = folder / str(file)
        if path.parent != folder or not path.is_file():
            raise CheckpointInvalid(f"{folder} lacks the shard {file!r}, which {_INDEX} names for {name!r}; fetch it")
        shards.setdefault(path, []).append(name)
    return shards


def _files(folder: Path) -> dict[str, bytes]:
    present = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
    if "tokenizer.json" not in present and any((folder / name).is_file() for name in _SLOW_TOKENIZERS):
        present["tokenizer.json"] = _converted_tokenizer(folder)
    if "chat_template.jinja" not in present and (template := _embedded_chat_template(folder)):
        present["chat_template.jinja"] = template.encode()
    return present


def _embedded_chat_template(folder: Path) -> str | None:
    """Reads the chat template from tokenizer_config.json, where older checkpoints have it. None if there is none.

    If the file has several templates, returns the one named `default`.
    """
    path = folder / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _converted_tokenizer(folder: Path) -> bytes:
    try:
        from transformers import AutoTokenizer  # heavy, and needed for old checkpoints only
    except ImportError as error:
        raise LibraryMissing(f"{folder} has no tokenizer.json; making one takes transformers", error) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        text: str = tokenizer.backend_tokenizer.to_str()
    except (ValueError, OSError, AttributeError, ImportError) as error:
        raise CheckpointInvalid(f"{folder} has no tokenizer.json, and none can be made from its files: {error}") from error
    return text.encode()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a checkpoint. Raises CheckpointInvalid if it is missing or is no JSON object."""
    return read_json_as(path, dict[str, Any])


def read_json_as(path: Path, type_: type[T]) -> T:
    try:
        return msgspec.json.decode(_BARE_FLOAT.sub(_TAGGED_FLOAT, path.read_bytes()), type=type_)
    except FileNotFoundError as error:
        raise CheckpointInvalid(f"{path.parent} has no {path.name}; is it the folder of a checkpoint?") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointInvalid(f"{path} is not the JSON it should be: {error}") from error
