"""A checkpoint larger than the memory that publishing may take: killed half-way, and finished by a second run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from storage.checkpoints.safetensors_format import TensorSpan, lay_out, read_spans
from storage.errors import ModelNotPublished
from storage.models.model_repository import read_manifest
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from tests.support.paths import ROOT
from tests.support.storage.storage import STORE_OF_ARGUMENTS, store_arguments

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32_000
MEMORY_LIMIT_BYTES = 600 * 10**6

PUBLISH = f"""{STORE_OF_ARGUMENTS}
from storage.models.publisher import publish
publish(sys.argv[1], store, "large", "bfloat16", progress=lambda now: print(now.done_bytes, now.total_bytes, flush=True))
print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


Shapes = dict[str, tuple[int, ...]]


def layer_shapes(layer: int) -> Shapes:
    prefix = f"model.layers.{layer}."
    square, up, down = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    attention: Shapes = {f"{prefix}self_attn.{name}_proj.weight": square for name in "qkvo"}
    mlp: Shapes = {f"{prefix}mlp.{name}_proj.weight": shape for name, shape in (("gate", up), ("up", up), ("down", down))}
    norms: Shapes = {f"{prefix}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    return attention | mlp | norms


def make_checkpoint(folder: Path, layers: int) -> None:
    """Three shards, sparse on disk: zeros, with the tensor's name and some noise in each MiB, so that all differ."""
    folder.mkdir()
    matrix = (VOCABULARY, HIDDEN)
    shapes: Shapes = {"model.embed_tokens.weight": matrix}
    for layer in range(layers):
        shapes |= layer_shapes(layer)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": matrix}
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        shard = names[number * len(names) // 3 : (number + 1) * len(names) // 3]
        weight_map |= dict.fromkeys(shard, file)
        header, spans = lay_out({name: ("BF16", shapes[name]) for name in shard})
        with (folder / file).open("wb") as out:
            out.write(header)
            out.truncate(max(span.end for span in spans.values()))
            for name, span in spans.items():
                for position in range(span.start, span.end - 256, 2**20):
                    out.seek(position)
                    out.write(name.encode() + os.urandom(64))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def publisher(folder: Path, store: EmbeddedStore) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", PUBLISH, str(folder), *store_arguments(store.settings)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def peak_bytes(process: subprocess.Popen[str]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def kill_half_way(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    with process:
        for line in process.stdout:
            done, total = map(int, line.split())
            if done * 2 > total:
                assert peak_bytes(process) < MEMORY_LIMIT_BYTES
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    *progress, peak = output.splitlines()
    done, total = progress[-1].split()
    assert done == total
    assert 1024 * int(peak.split()[1]) < MEMORY_LIMIT_BYTES


@pytest.mark.timeout(240)
def test_gigabytes_in_little_memory_killed_and_resumed(tmp_path: Path, wide: bool) -> None:
    layers = 17 if wide else 10
    checkpoint, data = tmp_path / "checkpoint", tmp_path / "store"
    make_checkpoint(checkpoint, layers)
    assert sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) > 1.9 * MEMORY_LIMIT_BYTES
    with EmbeddedStore(data) as store:
        kill_half_way(publisher(checkpoint, store))
        with pytest.raises(ModelNotPublished):
            read_manifest(ObjectStore(store.settings), "large", "bfloat16")
        finished = {path.name.removesuffix(".fragment.json") for path in data.rglob("*.fragment.json")}
        written = {path: path.stat().st_mtime_ns for path in data.rglob("*.safetensors") if path.stem in finished}
        assert len(written) >= layers // 2 - 4  # those that were in flight are begun again
        finish(publisher(checkpoint, store))
        assert {path: path.stat().st_mtime_ns for path in written} == written, "nothing was uploaded twice"
        manifest = read_manifest(ObjectStore(store.settings), "large", "bfloat16")
    assert_same_tensors(checkpoint, [data / "lamina" / stored.key for stored in manifest.objects.values()])


def assert_same_tensors(checkpoint: Path, published: list[Path]) -> None:
    originals = {name: (path, span) for path in checkpoint.glob("*.safetensors") for name, span in read_spans(path).items()}
    copies = {name: (path, span) for path in published for name, span in read_spans(path).items()}
    assert copies.keys() == originals.keys()
    for name in originals:
        assert content(*copies[name]) == content(*originals[name]), name


def content(path: Path, span: TensorSpan) -> bytes:
    with path.open("rb") as file:
        file.seek(span.start)
        return file.read(span.end - span.start)
