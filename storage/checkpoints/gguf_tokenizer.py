"""Writes the tokenizer of a GGUF file as Hugging Face's files, from the file's own vocabulary and rules.

Known are byte BPE with the rules of `gguf_pretokenizers`, SentencePiece BPE with scores (`llama`), and BPE on characters with
merges (`gemma4`). transformers derives a tokenizer too, but ignores the rules of `tokenizer.ggml.pre`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from storage.checkpoints.gguf_pretokenizers import PRE_TOKENIZERS
from storage.errors import CheckpointInvalid

BOS: Final = "tokenizer.ggml.bos_token_id"
EOS: Final = "tokenizer.ggml.eos_token_id"
_UNKNOWN: Final = 2  # a value of tokenizer.ggml.token_type; see the GGUF specification
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
# Fill-in-the-middle: begin, suffix and middle of a prompt; and what separates files, which ends an answer as in llama.cpp.
_FILL_IN: Final = {"fim_pre": "fim_prefix_token", "fim_suf": "fim_suffix_token", "fim_mid": "fim_middle_token"}
_FILE_ENDS: Final = ("fim_pad", "fim_rep", "fim_sep")
_TOKEN_IDS: Final = ("bos", "eos", "eot", "eom", "unknown", "padding", *_FILL_IN, *_FILE_ENDS)
_TEMPLATE: Final = "tokenizer.chat_template"
_SPACE: Final = "▁"  # how SentencePiece writes a space
# Tokens that end a turn, found by their text, since many files name only the end of the text.
_ENDS_OF_TURN: Final = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<turn|>", "<|call|>", "<|end|>")


def tokenizer_files(path: Path, fields: Mapping[str, Any]) -> dict[str, bytes]:
    """Makes the files of a Hugging Face tokenizer, by name, from the GGUF's metadata `fields`. Raises CheckpointInvalid."""
    tokens = _checked_tokens(path, fields)
    ids = {key: fields.get(f"tokenizer.ggml.{key}_token_id") for key in _TOKEN_IDS}
    if fields["tokenizer.ggml.model"] == "llama":
        ids |= {key: ids[key] if ids[key] is not None else default for key, default in (("bos", 1), ("eos", 2), ("unknown", 0))}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {name: tokens[number] for key, name in names.items() if (number := ids[key]) is not None}
    ends_of_turn = {token for token in _ENDS_OF_TURN if token in tokens}
    if {"<|call|>", "<|end|>"} <= ends_of_turn:
        ends_of_turn.remove("<|end|>")  # in gpt-oss it ends a message, and the turn goes on
    ends = {ids["eos"], ids["eot"], ids["eom"], *(ids[key] for key in _FILE_ENDS), *map(tokens.index, ends_of_turn)}
    generation = {
        "bos_token_id": ids["bos"],
        "eos_token_id": sorted(number for number in ends if number is not None),
        "pad_token_id": ids["padding"],
    }
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | special
    if fill_in := {name: tokens[number] for key, name in _FILL_IN.items() if (number := ids[key]) is not None}:
        config["extra_special_tokens"] = fill_in
    templates = {
        key.removeprefix(_TEMPLATE).removeprefix(".") or "default": text
        for key, text in fields.items()
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")
    }
    if templates.keys() - {"default"}:
        config["chat_template"] = [{"name": name, "template": text} for name, text in sorted(templates.items())]
    files = {
        "tokenizer.json": _tokenizer(path, fields, tokens, special).to_str(pretty=False).encode(),
        "tokenizer_config.json": msgspec.json.format(msgspec.json.encode(config), indent=2),
        "generation_config.json": msgspec.json.format(msgspec.json.encode(generation), indent=2),
    }
    if templates.get("default"):
        files["chat_template.jinja"] = templates["default"].encode()
    return files


def _tokenizer(path: Path, fields: Mapping[str, Any], tokens: list[str], special: Mapping[str, str]) -> Tokenizer:
    kind, rule_name = fields["tokenizer.ggml.model"], str(fields.get("tokenizer.ggml.pre") or "default")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    starts = kind == "llama"
    if kind == "gpt2" and rule_name in PRE_TOKENIZERS:
        rule = PRE_TOKENIZERS[rule_name]
        starts = rule.add_bos
        merges = _merges(path, fields, vocabulary)
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.ignore_merges))
        if rule.nfc:
            tokenizer.normalizer = normalizers.NFC()
        words = [pre_tokenizers.Split(Regex(word), behavior="isolated") for word in rule.words]
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, in_bytes])
        tokenizer.decoder = decoders.ByteLevel()
    elif kind in ("llama", "gemma4"):
        merges = _merges(path, fields, vocabulary) if kind == "gemma4" else _merges_by_score(path, fields, vocabulary)
        unknown = special.get("unk_token")
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        prefix = fields.get("tokenizer.ggml.add_space_prefix", kind == "llama")
        replace = normalizers.Replace(" ", _SPACE)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
        if kind == "gemma4":
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|[\n]+"), behavior="isolated")
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    else:
        raise CheckpointInvalid(
            f"{path} has a tokenizer of model {kind[:64]!r} with the rules {rule_name[:64]!r}; known are llama, gemma4, and "
            f"gpt2 with {', '.join(sorted(PRE_TOKENIZERS))}. Name a folder with the model's tokenizer.json by --tokenizer"
        )
    added = [
        AddedToken(token, special=token_type != _USER_DEFINED, normalized=False, rstrip=_strips(fields, token))
        for token, token_type in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if token_type in (_CONTROL, _USER_DEFINED) or (token_type == _UNKNOWN and kind != "gpt2")
    ]
    tokenizer.add_tokens(added)
    before = [special.get("bos_token", "")] if fields.get("tokenizer.ggml.add_bos_token", starts) else []
    after = [special.get("eos_token", "")] if fields.get("tokenizer.ggml.add_eos_token") else []
    if "" in (*before, *after):
        raise CheckpointInvalid(
            f"{path} puts a token before or after every text, and lacks {BOS} or {EOS}; make the GGUF file again"
        )
    if before or after:
        pairs = [(token, vocabulary[token]) for token in {*before, *after}]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=pairs)
    return tokenizer


def _strips(fields: Mapping[str, Any], token: str) -> bool:
    """Whether spaces after a special token are dropped.

    GGUF files do not say so. llama.cpp decides it by the name of the model, and so does this function.
    """
    name = str(fields.get("general.name", "")).lower()
    return ("phi-3" in name or "phi3" in name) and token not in ("<unk>", "<s>", "<|endoftext|>")


def _checked_tokens(path: Path, fields: Mapping[str, Any]) -> list[str]:
    """Returns the vocabulary, after a check of all metadata that this file reads. Raises CheckpointInvalid."""
    kind = fields.get("tokenizer.ggml.model")
    if not isinstance(kind, str):
        raise CheckpointInvalid(f"{path} has no tokenizer; name a folder with the model's tokenizer.json by --tokenizer")
    lists = [("tokens", str), ("token_type", int), ("scores", float) if kind == "llama" else ("merges", str)]
    for key, item in lists:
        values = fields.get(f"tokenizer.ggml.{key}")
        if not isinstance(values, list) or not all(type(value) is item for value in values):
            raise CheckpointInvalid(f"{path} has no list of tokenizer.ggml.{key}; make the GGUF file again")
    tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(fields["tokenizer.ggml.tokens"])]
    for key, _ in lists:
        if key != "merges" and len(fields[f"tokenizer.ggml.{key}"]) != len(tokens):
            raise CheckpointInvalid(
                f"{path} has {len(tokens)} tokens and {len(fields[f'tokenizer.ggml.{key}'])} entries of tokenizer.ggml.{key}; "
                "make the GGUF file again"
            )
    if len(set(tokens)) != len(tokens):
        raise CheckpointInvalid(f"{path} has a token twice; make the GGUF file again")
    for key in _TOKEN_IDS:
        number = fields.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and (type(number) is not int or not 0 <= number < len(tokens)):
            raise CheckpointInvalid(
                f"{path} has tokenizer.ggml.{key}_token_id = {str(number)[:64]} and {len(tokens)} tokens; "
                "make the GGUF file again"
            )
    for key, text in fields.items():
        if (key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")) and not isinstance(text, str):
            raise CheckpointInvalid(f"{path} has a {key} that is no text; make the GGUF file again")
    return tokens


def _merges(path: Path, fields: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for merge in fields["tokenizer.ggml.merges"]:
        middle = merge.find(" ", 1)
        left, right = merge[:middle], merge[middle + 1 :]
        if not {left, right, left + right} <= vocabulary.keys():
            raise CheckpointInvalid(f"{path} merges {merge!r}, which are no tokens; make the GGUF file again")
        pairs.append((left, right))
    return pairs


def _merges_by_score(path: Path, fields: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Lists every pair of tokens that joins to a third token, in the order of the third token's score, best first.

    SentencePiece merges the pair with the best score. A list of merges in the order of scores has the same effect.
    """
    scores, types = fields["tokenizer.ggml.scores"], fields["tokenizer.ggml.token_type"]
    pieces = {token: number for token, number in vocabulary.items() if types[number] not in (_UNKNOWN, _CONTROL)}

    def pairs() -> Iterator[tuple[float, int, int, str, str]]:
        for token, number in pieces.items():
            for middle in range(1, len(token)):
                left, right = token[:middle], token[middle:]
                if left in pieces and right in pieces:
                    yield -scores[number], number, -middle, left, right

    return [(left, right) for *_, left, right in sorted(pairs())]
