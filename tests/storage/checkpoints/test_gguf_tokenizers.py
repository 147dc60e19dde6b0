"""Tokenizers of GGUF files: vocabularies made on the spot, and llama.cpp's own vocabularies with their golden ids."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from storage.checkpoints.gguf_format import read_header
from storage.checkpoints.gguf_pretokenizers import PRE_TOKENIZERS
from storage.checkpoints.gguf_tokenizer import tokenizer_files
from storage.errors import CheckpointInvalid
from tests.storage.checkpoints.test_gguf import TEXT
from tests.support.storage import llama_cpp
from tests.support.storage.storage import default_model_metadata

GOLDEN = (
    "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3",
    "qwen2", "qwen35", "refact", "starcoder",
)  # fmt: skip
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0, **dict.fromkeys(BYTES, 0.0)} | {
    piece: -float(rank) for rank, piece in enumerate(["▁t", "he", "▁the", "▁", "t", "h", "e", "<", "s", ">", "<tool>"])
}
SENTENCEPIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": list(PIECES),
    "tokenizer.ggml.scores": list(PIECES.values()),
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 10, 4],
}


def tokenizer(fields: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_files(Path("x.gguf"), fields)["tokenizer.json"].decode())


@pytest.mark.parametrize(
    ("text", "fields", "tokens"),
    [
        ("the the", {}, ["<s>", "▁the", "▁the"]),
        ("é", {}, ["<s>", "▁", "<0xC3>", "<0xA9>"]),
        ("the<s>the<tool>the", {}, ["<s>", "▁the", "<s>", "▁the", "<tool>", "▁the"]),
        ("the the", {"tokenizer.ggml.add_space_prefix": False}, ["<s>", "t", "he", "▁the"]),
        ("the", {"tokenizer.ggml.add_bos_token": False}, ["▁the"]),
        ("the", {"tokenizer.ggml.add_eos_token": True}, ["<s>", "▁the", "</s>"]),
    ],
)
def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(text: str, fields: dict[str, Any], tokens: list[str]) -> None:
    ours = tokenizer(SENTENCEPIECE | fields)
    ids = ours.encode(text).ids
    assert [ours.id_to_token(number) for number in ids] == tokens
    assert ours.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace("<s>", "").replace(" ", "")


@pytest.mark.parametrize(
    ("rule", "text", "words"),
    [
        ("llama-bpe", "12345 It'LL be", ["123", "45", " It", "'LL", " be"]),
        ("tekken", "12 MyName's", ["1", "2", " My", "Name", "'s"]),
        ("gpt-4o", "12345 MyName's", ["123", "45", " My", "Name's"]),
        ("kimi-k2", "你好abc1234", ["你好", "abc", "123", "4"]),
        ("superbpe", "1234567", ["1", "234", "567"]),
        ("tiny_aya", "1234567", ["1", "234", "567"]),
        ("deepseek-v3", "a1234.foo", ["a", "123", "4", ".foo"]),
    ],
)
def test_a_rule_cuts_text_into_words(rule: str, text: str, words: list[str]) -> None:
    """Without merges each word's characters are tokens, so words are what the pre-tokenizer says."""
    ours = tokenizer(default_model_metadata() | {"tokenizer.ggml.pre": rule})
    spans = [span for _, span in ours.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[first:last] for first, last in spans] == words


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        ({}, ["<|im_end|>"]),
        ({"<|im_start|>": "<|call|>", "<|im_end|>": "<|end|>"}, ["<|call|>"]),
        ({"<|im_start|>": "<|eot_id|>"}, ["<|eot_id|>", "<|im_end|>"]),
    ],
)
def test_tokens_that_end_a_turn_end_generation(tokens: dict[str, str], ends: list[str]) -> None:
    fields = default_model_metadata()
    names = [tokens.get(token, token) for token in fields["tokenizer.ggml.tokens"]]
    changed = fields | {"tokenizer.ggml.tokens": names, "tokenizer.ggml.eos_token_id": names.index(ends[0])}
    files = tokenizer_files(Path("x.gguf"), changed)
    for end in ends:
        assert str(names.index(end)).encode() in files["generation_config.json"]
    assert b'"eos_token_id": [' in files["generation_config.json"]


def test_named_templates_and_tokens_to_fill_in_are_published() -> None:
    fields = default_model_metadata()
    number = fields["tokenizer.ggml.eos_token_id"]
    added = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b", "tokenizer.chat_templates": ["tool_use"]}
    ids = {f"tokenizer.ggml.{key}_token_id": number + 1 + place for place, key in enumerate(("fim_pre", "fim_sep", "eot"))}
    files = tokenizer_files(Path("x.gguf"), fields | added | ids)
    config, tokens = json.loads(files["tokenizer_config.json"]), fields["tokenizer.ggml.tokens"]
    assert files["chat_template.jinja"] == b"a"
    assert config["chat_template"] == [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert config["extra_special_tokens"] == {"fim_prefix_token": tokens[number + 1]}
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [number, number + 2, number + 3]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokenizer.chat_template.rag": 1}, r"has a tokenizer\.chat_template\.rag that is no text"),
        ({"tokenizer.ggml.fim_mid_token_id": 2**31}, "fim_mid_token_id = 2147483648 and"),
        (
            {"tokenizer.ggml.pre": "of-tomorrow"},
            r"'of-tomorrow'; known are llama, gemma4, and gpt2 with a\.x-4\.0.*--tokenizer",
        ),
        ({"tokenizer.ggml.model": "bert"}, r"of model 'bert'.*--tokenizer"),
        ({"tokenizer.ggml.model": None}, r"has no tokenizer; name a folder .* by --tokenizer"),
        ({"tokenizer.ggml.model": "llama"}, r"no list of tokenizer\.ggml\.scores"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "a token twice"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "lacks tokenizer.ggml.bos_token_id"),
    ],
)
def test_what_is_not_known_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointInvalid, match=words):
        tokenizer_files(Path("x.gguf"), default_model_metadata() | fields)


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", GOLDEN)
def test_ids_are_the_golden_ones(name: str) -> None:
    path, cases = llama_cpp.golden(name)
    ours = tokenizer(read_header(path).fields)
    assert [(text, ours.encode(text, add_special_tokens=False).ids) for text, _ in cases] == cases


@pytest.mark.llamacpp
@pytest.mark.parametrize("rule", sorted(PRE_TOKENIZERS))
def test_ids_are_those_of_llama_cpp(rule: str, tmp_path: Path) -> None:
    path, cases = llama_cpp.golden("gpt-2")
    renamed = llama_cpp.relabel(path, tmp_path / "vocabulary.gguf", rule)
    ours = tokenizer(read_header(renamed).fields)
    with llama_cpp.vocabulary(renamed) as theirs:
        for text in [text for text, _ in cases] + TEXT.split("\n"):
            # llama.cpp does not compose characters where the model's own tokenizer does.
            given = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[rule].nfc else text
            assert ours.encode(given).ids == theirs(given), text
