"""The default model: its GGUF's weights against transformers' own reading, its tokenizer against an independent one."""

import json
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig

from storage.checkpoints.checkpoint import Checkpoint
from storage.checkpoints.gguf_checkpoint import open_gguf
from storage.checkpoints.gguf_format import read_header
from storage.checkpoints.gguf_tokenizer import tokenizer_files
from storage.errors import ArchitectureUnsupported, CheckpointInvalid, StorageError
from tests.support.storage.storage import default_model_gguf, default_model_metadata
from tests.support.storage.torch_tensors import assert_equal, checkpoint_floats, gguf_by_transformers

TEXT = """In 2024, 1234567 people paid $3,141.59 (or 2 718 €) for 0x1F600 items; call +49-30-901820 at 10:45:07.
The quick brown fox doesn't jump; it's we'll-known, they'd've said  —  "naïve café", ﬁancé.
Ein Überläufer aß Spätzle. Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم.
नमस्ते दुनिया। 你好，世界！こんにちは世界 안녕하세요
def f(x: int) -> int:\n\treturn (x ** 2 + 17) % 1_000_003  # ok?\n\n\n    for i in range(10): print(f"{i:>04d}")\r\n
½ ² ٣٤٥ १२३ Ⅷ 👩‍👩‍👧‍👦🏳️‍🌈 <|im_start|>user\nHow much is 12*34?<|im_end|>\n<|endoftext|> trailing spaces   """


@pytest.fixture(scope="module")
def path() -> Path:
    return default_model_gguf()


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Checkpoint:
    return open_gguf(path)


@pytest.fixture(scope="module")
def fields() -> dict[str, Any]:
    return default_model_metadata()


@pytest.fixture(scope="module")
def read_by_transformers(path: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    return gguf_by_transformers(path, checkpoint)


def test_weights_are_bit_equal_to_transformers(checkpoint: Checkpoint, read_by_transformers: dict[str, Any]) -> None:
    assert_equal(checkpoint_floats(checkpoint), read_by_transformers["tensors"])


def test_the_configuration_equals_the_metadata(checkpoint: Checkpoint, read_by_transformers: dict[str, Any]) -> None:
    theirs = AutoConfig.for_model(**read_by_transformers["config"]).to_dict()
    ours = AutoConfig.for_model(**checkpoint.config).to_dict()
    ignored = {"_model_name_or_path", "architectures", "dtype", "pad_token_id", "unk_token_id"}
    assert {name: value for name, value in ours.items() if name not in ignored} == {
        name: value for name, value in theirs.items() if name not in ignored
    }
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]


def test_the_tokenizer_equals_an_independent_reading(fields: dict[str, Any], checkpoint: Checkpoint) -> None:
    tokenizer = Tokenizer.from_str(checkpoint.files["tokenizer.json"].decode())
    ids = tokenizer.encode(TEXT).ids
    assert ids == list(IndependentReading(fields).encode(TEXT))
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXT
    assert tokenizer.encode("1234567").tokens == list("1234567"), "digits stand alone"


def test_the_files_beside_the_tokenizer(fields: dict[str, Any], checkpoint: Checkpoint) -> None:
    assert checkpoint.files["chat_template.jinja"].decode() == fields["tokenizer.chat_template"]
    config = json.loads(checkpoint.files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert json.loads(checkpoint.files["generation_config.json"])["eos_token_id"] == [2]


def test_a_begin_token_is_added_if_the_file_says_so(fields: dict[str, Any]) -> None:
    files = tokenizer_files(Path("x.gguf"), fields | {"tokenizer.ggml.add_bos_token": True})
    assert Tokenizer.from_str(files["tokenizer.json"].decode()).encode("a").tokens == ["<|im_start|>", "a"]


@pytest.mark.parametrize(
    ("architecture", "fields", "error", "words"),
    [
        ("rwkv7", {}, ArchitectureUnsupported, "holds a 'rwkv7'; known are llama, qwen2, qwen3"),
        ("llama", {}, CheckpointInvalid, r"lacks llama\.block_count"),
    ],
)
def test_metadata_that_are_not_supported_or_missing_are_named(
    architecture: str, fields: dict[str, str], error: type[StorageError], words: str, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", architecture)
    for key, value in fields.items():
        writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(error, match=words):
        open_gguf(tmp_path / "x.gguf")


def test_metadata_are_those_that_gguf_reads(path: Path, fields: dict[str, Any]) -> None:
    header = read_header(path)
    assert header.fields == {name: value for name, value in fields.items() if not name.startswith("GGUF.")}


@pytest.mark.parametrize("size", [10, 100_000, 50_000_000])
def test_a_truncated_file_is_named(path: Path, tmp_path: Path, size: int) -> None:
    cut = tmp_path / "cut.gguf"
    with path.open("rb") as file:
        cut.write_bytes(file.read(size))
    with pytest.raises(CheckpointInvalid, match=r"cut\.gguf is no GGUF file, or only its beginning"):
        open_gguf(cut)


class IndependentReading:
    """Byte-level BPE straight from the GGUF's vocabulary and merges, with the rules that `smollm` stands for in llama.cpp:
    special tokens first, then every digit by itself, then GPT-2's words, then merges by rank. Slow, and shares no code.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        assert fields["tokenizer.ggml.pre"] == "smollm"
        self._ids = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"])}
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(fields["tokenizer.ggml.merges"])}
        types = fields["tokenizer.ggml.token_type"]
        special = [token for token, number in self._ids.items() if types[number] == 3]
        self._special = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    def encode(self, text: str) -> Iterator[int]:
        for piece in self._special.split(text):
            if self._special.fullmatch(piece):
                yield self._ids[piece]
                continue
            for run in digits_apart(piece):
                for word in gpt2_words(run):
                    yield from (self._ids[token] for token in self._merged(word) if token in self._ids)

    def _merged(self, word: str) -> list[str]:
        tokens = [byte_letters()[byte] for byte in word.encode()]
        while len(tokens) > 1:
            pairs = list(pairwise(tokens))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, 1 << 60))
            if best not in self._ranks:
                break
            at = pairs.index(best)
            tokens[at : at + 2] = ["".join(best)]
        return tokens


def digits_apart(text: str) -> list[str]:
    r"""\p{N} by itself; str.isnumeric is a little more than \p{N}, so the categories are asked."""
    pieces, run = [], ""
    for character in text:
        if unicodedata.category(character) in ("Nd", "Nl", "No"):
            pieces += [run, character]
            run = ""
        else:
            run += character
    return [piece for piece in (*pieces, run) if piece]


def gpt2_words(text: str) -> list[str]:
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ without a regex library."""

    def kind(character: str) -> str:
        if character.isspace():
            return "space"
        return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")

    words, at = [], 0
    while at < len(text):
        short = next((end for end in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(end, at)), None)
        if short:
            words.append(short)
            at += len(short)
            continue
        start = at + (text[at] == " " and at + 1 < len(text) and kind(text[at + 1]) != "space")
        end = start
        while end < len(text) and kind(text[end]) == kind(text[start]):
            end += 1
        if kind(text[start]) == "space" and end < len(text) and end - start > 1:
            end -= 1  # the last space belongs to the next word, or stands alone
        words.append(text[at:end])
        at = end
    return words


@cache
def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for every byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(others)}
