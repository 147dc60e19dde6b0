"""Perplexity of a model in each dtype, through the lean layer group cut in three: what int8 and bf16 cost in quality.

    python -m bench.stage.perplexity
    python -m bench.stage.perplexity --model path/to/checkpoint --text a.txt --text b.txt --keep-wide down_proj

Weights are converted as the publisher converts them. The table compares each dtype with float32: perplexity, and how often
the likeliest token is the same. It is printed as Markdown.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import click
import torch
from tokenizers import Tokenizer

from functions.stage.models.layer_group import Segment
from functions.stage.models.llama.group import LlamaGroup
from knative.spec.model_sources import packaged_model
from storage.checkpoints.checkpoint import Checkpoint
from storage.checkpoints.model_source import locate, open_checkpoint
from storage.models.conversion import convert_tensor
from storage.models.model_repository import Dtype
from storage.models.object_writer import TargetTensor

_TEXTS: Final = (Path(__file__).parents[1] / "data" / "lighthouse.txt", Path(__file__).parents[2] / "LICENSE")
_WINDOW_TOKENS: Final = 1024
_TORCH_DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}


@dataclass(frozen=True, slots=True)
class Reading:
    """How a model reads a text."""

    perplexity: float
    likeliest: torch.Tensor
    """The likeliest next token at every place, int64."""


def stages(checkpoint: Checkpoint, dtype: Dtype, keep_wide: Sequence[str]) -> list[LlamaGroup]:
    """The whole model as three groups, hidden states between them in the dtype of the wire."""
    config = json.loads(checkpoint.files["config.json"])
    tensors: dict[str, torch.Tensor] = {}
    for name, source in checkpoint.tensors.items():
        wide: Sequence[str] = keep_wide if ".layers." in name else [name.split(".")[-2]]
        tensors |= {stored: _loaded(target) for stored, target in convert_tensor(name, source, dtype, wide).items()}
    layers = config["num_hidden_layers"]
    bounds = [layers * stage // 3 for stage in range(4)]
    return [_group(config, tensors, first, last, dtype) for first, last in pairwise(bounds)]


def _group(config: dict[str, Any], tensors: dict[str, torch.Tensor], first: int, last: int, dtype: Dtype) -> LlamaGroup:
    budget = 2 * 4 * _WINDOW_TOKENS * (last - first) * config["hidden_size"]
    return LlamaGroup.build(config, dict(tensors), first, last, dtype, "cpu", budget)


def _loaded(target: TargetTensor) -> torch.Tensor:
    data = b"".join(target.blocks())
    return torch.frombuffer(bytearray(data), dtype=_TORCH_DTYPES[target.dtype]).view(target.shape)


def read(groups: Sequence[LlamaGroup], token_ids: Sequence[int]) -> Reading:
    """Every window of the text by itself; the first token of a window is given, not predicted."""
    log_probability = 0.0
    predicted = 0
    likeliest = []
    for start in range(0, len(token_ids) - 1, _WINDOW_TOKENS):
        window = torch.tensor(token_ids[start : start + _WINDOW_TOKENS])
        log_probabilities = _logits(groups, window)[:-1].log_softmax(-1)
        log_probability += float(log_probabilities.gather(1, window[1:, None]).double().sum())
        predicted += len(window) - 1
        likeliest.append(log_probabilities.argmax(-1))
    return Reading(math.exp(-log_probability / predicted), torch.cat(likeliest))


def _logits(groups: Sequence[LlamaGroup], window: torch.Tensor) -> torch.Tensor:
    hidden = window
    for group in groups:
        handle = group.kv.reserve(len(window))
        hidden = group.forward(hidden, [Segment(handle, 0, len(window))])
        group.kv.release(handle)
    return groups[-1].logits(hidden)


def rows(checkpoint: Checkpoint, texts: Sequence[Path], keep_wide: Sequence[str]) -> list[str]:
    """One Markdown row per dtype and text."""
    tokenizer = Tokenizer.from_buffer(checkpoint.files["tokenizer.json"])
    token_ids = {text: tokenizer.encode(text.read_text()).ids for text in texts}
    table = []
    exact: dict[Path, Reading] = {}
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16", "int8")
    for dtype in dtypes:
        groups = stages(checkpoint, dtype, keep_wide)
        for text, ids in token_ids.items():
            reading = read(groups, ids)
            reference = exact.setdefault(text, reading)
            worse = reading.perplexity / reference.perplexity - 1
            same = (reading.likeliest == reference.likeliest).double().mean()
            table.append(f"| {dtype} | {text.name} ({len(ids)}) | {reading.perplexity:.3f} | {worse:+.2%} | {same:.3f} |")
    return table


@click.command()
@click.option("--model", help="A folder, a GGUF file, or a hub id; without it, the default model.")
@click.option("--text", "texts", type=click.Path(exists=True, path_type=Path), multiple=True, default=_TEXTS)
@click.option("--keep-wide", multiple=True, help="A matrix, such as down_proj, that int8 leaves in bfloat16.")
def main(model: str | None, texts: Sequence[Path], keep_wide: Sequence[str]) -> None:
    """Print a Markdown table of perplexity by dtype and text."""
    checkpoint = open_checkpoint(locate(model or packaged_model()))
    click.echo("| dtype | text (tokens) | perplexity | against float32 | same likeliest token |\n|---|---|---|---|---|")
    for row in rows(checkpoint, texts, keep_wide):
        click.echo(row)


if __name__ == "__main__":
    main()
