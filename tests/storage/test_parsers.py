"""What storage reads from outside, with anything in it: no exception but the declared ones, no work beyond the bytes that came.

Work is counted in lines of Python that ran, not in seconds.
"""

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from storage.checkpoints.gguf_checkpoint import open_gguf
from storage.checkpoints.gguf_format import read_header
from storage.checkpoints.safetensors_format import lay_out, read_spans
from storage.errors import CheckpointInvalid, ManifestInvalid
from storage.models.model_repository import decode_manifest, encode_manifest
from tests.storage.models.test_model_repository import a_manifest
from tests.support.steps import lines
from tests.support.storage.gguf_bytes import ARRAY, FORMATS, LLAMA, STRING, TENSORS, gguf_file, string

few = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
DEEP = "[" * 50_000


def mutated(document: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    """The document with one thing in it replaced, removed or added."""
    if isinstance(document, dict) and document and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(document)))
        action = draw(st.sampled_from(["descend", "descend", "descend", "drop", "add"]))
        rest = {name: value for name, value in document.items() if name != key}
        if action == "drop":
            return rest
        return document | ({draw(st.text(max_size=8)): draw(JSON)} if action == "add" else {key: mutated(document[key], draw)})
    if isinstance(document, list) and document and draw(st.booleans()):
        at = draw(st.integers(0, len(document) - 1))
        return [*document[:at], mutated(document[at], draw), *document[at + 1 :]]
    return draw(JSON)


MANIFEST = json.loads(encode_manifest(a_manifest()))


@few
@given(st.data())
def test_a_manifest_with_random_values_raises_declared_errors_only(data: st.DataObject) -> None:
    try:
        manifest = decode_manifest(json.dumps(mutated(MANIFEST, data.draw)).encode(), "key")
    except ManifestInvalid:
        return
    assert manifest.digest
    assert all(stored.bytes > 0 and stored.parts and stored.tensors for stored in manifest.objects.values())


@few
@given(st.binary(max_size=200))
@example(DEEP.encode())
@example(b'{"manifest_version": 2, "objects": ' + b'{"a":' * 50_000)
def test_random_bytes_are_no_manifest(data: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        decode_manifest(data, "key")


def many_layers(count: int) -> bytes:
    names = ["embedding", *(f"layer-{number:05d}" for number in range(count)), "head"]
    objects = {name: json.loads(json.dumps(MANIFEST["objects"]["head"]).replace("head.", f"{name}.")) for name in names}
    return json.dumps(MANIFEST | {"num_layers": count, "objects": objects}).encode()


def assert_linear(counted: list[int], at_least: int) -> None:
    """Lines of Python that ran for an input, and for one that is twice as long."""
    small, large = counted
    assert small > at_least
    assert large < 2.2 * small


def test_the_work_for_a_manifest_grows_with_its_length() -> None:
    manifests = [many_layers(count) for count in (200, 400)]
    assert_linear([lines(partial(decode_manifest, data, "key")) for data in manifests], 200)


def test_a_large_number_of_declared_layers_costs_nothing() -> None:
    data = json.dumps(MANIFEST | {"num_layers": 2**40}).encode()
    assert lines(lambda: decode_manifest(data, "key"), expect=ManifestInvalid) < 100


HEADER, _ = lay_out({"a.weight": ("F32", (4, 8)), "b.weight": ("BF16", (3,))})
ENTRIES = json.loads(HEADER[8:])


def safetensors_file(path: Path, header: bytes, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + b"\0" * 192)
    return path


@few
@given(st.data())
def test_a_safetensors_header_with_random_values_raises_declared_errors_only(tmp_path: Path, data: st.DataObject) -> None:
    path = safetensors_file(tmp_path / "x.safetensors", json.dumps(mutated(ENTRIES, data.draw)).encode())
    with suppress(CheckpointInvalid):
        assert all(0 <= span.start <= span.end <= path.stat().st_size for span in read_spans(path).values())


@few
@given(st.binary(max_size=100), st.none() | st.integers(0, 2**64 - 1))
@example(DEEP.encode(), None)
@example(b"[]", None)
@example(b'{"a": {"dtype": "F32", "shape": [' + b"9223372036854775807," * 50_000 + b"1]}}", None)
def test_random_bytes_are_no_safetensors_header(tmp_path: Path, header: bytes, length: int | None) -> None:
    path = safetensors_file(tmp_path / "x.safetensors", header, length)
    with suppress(CheckpointInvalid):
        assert read_spans(path) == {}


def test_a_million_dimensions_are_not_multiplied(tmp_path: Path) -> None:
    """The product of n numbers of 63 bits takes n² steps, out of sight of a count of lines."""
    shape = [2**62] * 100_000
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    with pytest.raises(CheckpointInvalid, match="has 100000 dimensions, more than 8"):
        read_spans(safetensors_file(tmp_path / "x.safetensors", header))


def test_the_work_for_a_safetensors_header_grows_with_its_length(tmp_path: Path) -> None:
    counted = []
    for count in (300, 600):
        entries = {f"x{number}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for number in range(count)}
        path = safetensors_file(tmp_path / "x.safetensors", json.dumps(entries).encode())
        counted.append(lines(partial(read_spans, path)))
    assert_linear(counted, 300)


@st.composite
def field(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[int, Any]:
    kind = draw(st.sampled_from([*FORMATS, STRING, ARRAY]))
    if kind == ARRAY:
        inner = draw(st.sampled_from([*FORMATS, STRING]))
        return kind, (inner, draw(st.lists(item(inner), max_size=5)))
    return kind, draw(item(kind))


def item(kind: int) -> st.SearchStrategy[Any]:
    if kind == STRING:
        return st.sampled_from(["", "a", "gpt2", "llama", "none", "<s>", " $A:1"]) | st.text(max_size=8)
    code = FORMATS[kind]
    if code in "fd":
        return st.floats(width=32 if code == "f" else 64)
    if code == "?":
        return st.booleans()
    bits = 8 * struct.calcsize(code)
    whole = st.integers(0, 2**bits - 1) if code.isupper() else st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return whole | st.integers(0, 4)


TENSOR = st.tuples(
    st.sampled_from(["token_embd.weight", "output.weight", "blk.0.attn_q.weight", "blk.0.attn_k.bias", "x.weight", "blk.0"]),
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 64), max_size=9).map(tuple),
    st.integers(0, 45),
    st.integers(0, 2**64 - 1) | st.just(0),
)


@few
@given(
    st.dictionaries(st.sampled_from([*LLAMA, "llama.rope.dimension_count", "general.alignment", "other"]), field(), max_size=3),
    st.none() | st.lists(TENSOR, max_size=3),
)
def test_a_gguf_file_with_random_fields_raises_declared_errors_only(
    tmp_path: Path, changes: dict[str, tuple[int, Any]], tensors: list[Any] | None
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_file({**LLAMA, **changes}, TENSORS if tensors is None else tensors))
    try:
        checkpoint = open_gguf(path)
    except CheckpointInvalid:
        return
    for tensor in checkpoint.tensors.values():
        assert sum(map(len, tensor.blocks())) == 4 * tensor.shape[0] * (tensor.shape[1] if len(tensor.shape) > 1 else 1)


WHOLE = gguf_file()


def test_the_file_for_mutations_is_valid(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(WHOLE)
    checkpoint = open_gguf(tmp_path / "x.gguf")
    assert checkpoint.tensors["model.embed_tokens.weight"].shape == (4, 8)
    assert checkpoint.config["head_dim"] == 4


@few
@given(st.integers(0, len(WHOLE)), st.integers(0, len(WHOLE) - 1), st.binary(max_size=12))
def test_a_truncated_or_altered_gguf_file_raises_declared_errors_only(tmp_path: Path, end: int, at: int, ink: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes((WHOLE[:at] + ink + WHOLE[at + len(ink) :])[:end])
    with suppress(CheckpointInvalid):
        open_gguf(path)


@few
@given(st.binary(max_size=100), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_random_bytes_are_no_gguf_header(tmp_path: Path, raw: bytes, tensors: int, fields: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_file(counts=(tensors, fields), raw=raw or b"\0"))
    with suppress(CheckpointInvalid):
        read_header(path)


NESTED = struct.pack("<IQ", ARRAY, 1)


@pytest.mark.parametrize(
    "raw",
    [
        string("k") + struct.pack("<IIQ", ARRAY, 0, 2**60),
        string("k") + struct.pack("<IIQ", ARRAY, STRING, 2**60),
        string("k") + struct.pack("<I", ARRAY) + NESTED * 50_000,
        struct.pack("<Q", 2**63) + b"k",
    ],
    ids=["bytes", "strings", "nesting", "name"],
)
def test_counts_beyond_the_file_are_refused(raw: bytes, tmp_path: Path) -> None:
    """gguf's own reader goes on until memory is gone."""
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_file(counts=(2**60, 2**60), raw=raw))
    assert lines(lambda: read_header(path), expect=CheckpointInvalid) < 200


def test_the_work_for_a_gguf_header_grows_with_its_length(tmp_path: Path) -> None:
    path, counted = tmp_path / "x.gguf", []
    for count in (1000, 2000):
        path.write_bytes(gguf_file({**LLAMA, "other": (ARRAY, (STRING, ["word"] * count))}))
        counted.append(lines(lambda: read_header(path)))
    assert_linear(counted, 1000)
