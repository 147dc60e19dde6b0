"""The models of `bench.peers`: the packaged one, and published shapes with random weights, as a folder and as GGUF files.

A random model has SmolLM2's tokenizer. Logits of tokens that this tokenizer does not have, and of special ones, are 0, so
that every greedy answer is text and as long as asked for.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.llama_cpp import SOURCES, tool
from knative.commands.model_choice import packaged_model
from storage.checkpoints.model_source import open_checkpoint

_SPECIAL_TOKENS: Final = 17  # of SmolLM2's tokenizer, the first of its ids
_TOKENS: Final = 49_152
_COMMON: Final = {
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}


def _shape(model_type: str, sizes: tuple[int, int, int, int, int], **fields: Any) -> Mapping[str, Any]:
    """sizes: of a token, of the feed-forward layer, layers, heads, heads of keys and values."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {"model_type": model_type, **_COMMON, **dict(zip(names, sizes, strict=True)), **fields}


PACKAGED: Final = "SmolLM2-135M"
SHAPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "Qwen2.5-0.5B": _shape("qwen2", (896, 4864, 24, 14, 2), vocab_size=151_936),
    "1.1B": _shape("llama", (2048, 8192, 16, 32, 8), vocab_size=_TOKENS),
    "Qwen3-0.6B": _shape("qwen3", (1024, 3072, 28, 16, 8), head_dim=128, vocab_size=151_936),
    "Llama-3.2-1B": _shape("llama", (2048, 8192, 16, 32, 8), head_dim=64, vocab_size=128_256),
    "Gemma-3-1B": _shape(
        "gemma3_text", (1152, 6912, 26, 4, 1), head_dim=256, vocab_size=262_144, sliding_window=512, query_pre_attn_scalar=256
    ),
    "LFM2-1.2B": _shape(
        "lfm2",
        (2048, 12_288, 16, 32, 8),
        vocab_size=65_536,
        block_multiple_of=256,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=True,
        full_attn_idxs=[2, 5, 8, 10, 12, 14],
    ),
    "Granite-4.0-H-1B": _shape(
        "granitemoehybrid",
        (1536, 4096, 40, 12, 4),
        vocab_size=100_352,
        shared_intermediate_size=4096,
        num_local_experts=0,
        num_experts_per_tok=0,
        layer_types=["attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)],
        mamba_n_heads=48,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_expand=2,
        position_embedding_type="nope",
    ),
    "Qwen3.5-0.8B": _shape("qwen3_5_text", (1024, 3584, 24, 8, 2), head_dim=256, vocab_size=248_320),
    "OLMoE-small": _shape(
        "olmoe", (1024, 512, 16, 16, 16), num_experts=32, num_experts_per_tok=8, vocab_size=50_304, tie_word_embeddings=False
    ),
}


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    source: str  # for `push`
    folder: Path  # of the GGUF files

    def gguf(self, kind: str) -> Path:
        """The file in a format of `llama-quantize`, made at the first call. Raises DidNotStart if llama.cpp is not built."""
        path = self.folder / f"{kind}.gguf"
        if not path.exists():
            whole = self._whole()
            options = ["--allow-requantize"] if self.name == PACKAGED else []
            _write(path, lambda part: [str(tool("llama-quantize")), *options, str(whole), str(part), kind])
        return path

    def in_8_bits(self) -> Path:
        """The folder with weights in 8 bits a channel, and activations a token, as compressed-tensors writes and vLLM reads."""
        target = self.folder / "w8a8"
        if not (target / "config.json").exists():
            _write_in_8_bits(Path(self.source), target)
        return target

    def _whole(self) -> Path:
        if self.name == PACKAGED:
            return Path(self.source)
        path = self.folder / "F16.gguf"
        if not path.exists():
            _write(path, lambda part: [sys.executable, "-m", "bench.peers.convert", str(SOURCES), self.source, str(part)])
        return path


def model(name: str, state: Path) -> Model:
    """A model by name, made under `state` at the first call."""
    folder = state / name
    folder.mkdir(parents=True, exist_ok=True)
    if name == PACKAGED:
        return Model(name, packaged_model(), folder)
    source = folder / name
    if not (source / "config.json").exists():
        _make(SHAPES[name], source)
    return Model(name, str(source), folder)


def _make(config: Mapping[str, Any], target: Path) -> None:
    """Writes a Hugging Face folder in bfloat16. config.json comes last: a folder without it is made again."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    fields = dict(config)
    built = AutoConfig.for_model(fields.pop("model_type"), **fields)
    whole = AutoModelForCausalLM.from_config(built, dtype=torch.bfloat16)
    with torch.no_grad():
        head = whole.get_output_embeddings().weight
        head[:_SPECIAL_TOKENS] = 0
        head[_TOKENS:] = 0
    whole.save_pretrained(target / "saved")
    for name, content in open_checkpoint(Path(packaged_model())).files.items():
        if name.startswith("tokenizer"):
            (target / name).write_bytes(content)
    for file in sorted((target / "saved").iterdir(), key=lambda file: file.name == "config.json"):
        file.rename(target / file.name)


def _write_in_8_bits(source: Path, target: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        tensors[name] = weight
        if weight.ndim == 2 and ".layers." in name:
            scale = (weight.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-8)
            tensors[name] = (weight.float() / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
    of_weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": of_weights}
    group["input_activations"] = {**of_weights, "strategy": "token", "dynamic": True}
    how = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
    quantization = {**how, "ignore": ["lm_head"], "config_groups": {"group_0": group}}
    target.mkdir(exist_ok=True)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    for file in source.glob("tokenizer*"):
        shutil.copy(file, target)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def _write(path: Path, command: Callable[[Path], list[str]]) -> None:
    """Runs a command that writes a file, which gets its name when it is whole. Raises RuntimeError with the command's end."""
    part = path.with_suffix(".part")
    run = subprocess.run(command(part), check=False, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{path.name} was not made: {run.stderr[-1500:] or run.stdout[-1500:]}")
    part.rename(path)
