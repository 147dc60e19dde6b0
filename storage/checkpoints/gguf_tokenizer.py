"""Writes the tokenizer of a GGUF file as Hugging Face's files, from the file's own vocabulary and rules.

transformers derives one too, but ignores the rules of `tokenizer.ggml.pre` (SmolLM's digits come out wrong).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from storage.errors import CheckpointInvalid

BOS: Final = "tokenizer.ggml.bos_token_id"
EOS: Final = "tokenizer.ggml.eos_token_id"
_CONTROL: Final = 3  # a value of tokenizer.ggml.token_type; see the GGUF specification
_USER_DEFINED: Final = 4  # another value of it
_TOKEN_IDS: Final = ("bos", "eos", "eot", "unknown", "padding")
_QWEN2_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm(tokenizer: Tokenizer) -> None:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])


def _qwen2(tokenizer: Tokenizer) -> None:
    words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])


# By `tokenizer.ggml.pre`.
_RULES: Final[Mapping[str, Callable[[Tokenizer], None]]] = {"gpt-2": _gpt2, "smollm": _smollm, "qwen2": _qwen2}


def tokenizer_files(path: Path, fields: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a Hugging Face tokenizer by name, made from the GGUF's metadata `fields`. Raises CheckpointInvalid."""
    _check_types(path, fields)
    ids = {key: fields.get(f"tokenizer.ggml.{key}_token_id") for key in _TOKEN_IDS}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {name: fields["tokenizer.ggml.tokens"][ids[key]] for key, name in names.items() if ids[key] is not None}
    generation = {
        "bos_token_id": ids["bos"],
        "eos_token_id": sorted({number for number in (ids["eos"], ids["eot"]) if number is not None}),
        "pad_token_id": ids["padding"],
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | special
    files = {
        "tokenizer.json": _tokenizer(path, fields, special).to_str(pretty=False).encode(),
        "tokenizer_config.json": msgspec.json.format(msgspec.json.encode(config), indent=2),
        "generation_config.json": msgspec.json.format(msgspec.json.encode(generation), indent=2),
    }
    if template := fields.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template.encode()
    return files


def _tokenizer(path: Path, fields: Mapping[str, Any], special: Mapping[str, str]) -> Tokenizer:
    kind, rules = str(fields.get("tokenizer.ggml.model")), str(fields.get("tokenizer.ggml.pre"))
    if kind != "gpt2" or rules not in _RULES:
        raise CheckpointInvalid(
            f"{path} has a tokenizer of model {kind!r} with the rules {rules!r}; known is gpt2 with {', '.join(_RULES)}. "
            "Publish the model from its Hugging Face folder, which has tokenizer.json"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(path, fields["tokenizer.ggml.merges"], vocabulary)))
    _RULES[rules](tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True):
        if token_type in (_CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=token_type == _CONTROL, normalized=False)])
    if fields.get("tokenizer.ggml.add_bos_token"):
        if BOS not in fields:
            raise CheckpointInvalid(f"{path} puts a token before every text, and lacks {BOS}; make the GGUF file again")
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, fields[BOS])])
    return tokenizer


def _check_types(path: Path, fields: Mapping[str, Any]) -> None:
    """Checks the metadata on which the rest of this file relies. Raises CheckpointInvalid."""
    for key, kind in (("tokens", str), ("merges", str), ("token_type", int)):
        values = fields.get(f"tokenizer.ggml.{key}")
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise CheckpointInvalid(f"{path} has no list of tokenizer.ggml.{key}; make the GGUF file again")
    size, types = len(fields["tokenizer.ggml.tokens"]), len(fields["tokenizer.ggml.token_type"])
    if size != types:
        raise CheckpointInvalid(f"{path} has {size} tokens and {types} types of tokens; make the GGUF file again")
    for key in _TOKEN_IDS:
        number = fields.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and (type(number) is not int or not 0 <= number < size):
            raise CheckpointInvalid(
                f"{path} has tokenizer.ggml.{key}_token_id = {str(number)[:64]} and {size} tokens; make the GGUF file again"
            )
    if not isinstance(fields.get("tokenizer.chat_template", ""), str):
        raise CheckpointInvalid(f"{path} has a tokenizer.chat_template that is no text; make the GGUF file again")


def _merges(path: Path, merges: list[str], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise CheckpointInvalid(f"{path} merges {merge!r}, which are no tokens; make the GGUF file again")
        pairs.append((left, right))
    return pairs
