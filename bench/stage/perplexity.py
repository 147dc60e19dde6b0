"""Perplexity of a model in each dtype, through the lean layer group cut in three: what bits cost in quality.

    python -m bench.stage.perplexity
    python -m bench.stage.perplexity --model path/to/checkpoint --text a.txt --text b.txt

Weights are converted as the publisher converts them. A table compares each dtype with float32: perplexity, and how often the
likeliest token is the same. For a GGUF file another compares the file as it is published in dtype kept with what llama.cpp's
program llama-perplexity (`make llama-cpp`) says of the same file and text. Both are printed as Markdown.
"""

import json
import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Final

import click
import numpy as np
from tokenizers import Tokenizer

from functions.stage.engine.sampler import log_probabilities
from functions.stage.models.build import build_layer_group
from functions.stage.models.floats import Array
from functions.stage.models.layer_group import KVDtype, LayerGroup, Segment
from knative.commands.model_choice import packaged_model
from storage.checkpoints.checkpoint import Checkpoint, SourceTensor
from storage.checkpoints.model_source import locate, open_checkpoint
from storage.loading.weight_loader import RawTensor
from storage.models.conversion import convert_tensor
from storage.models.model_repository import Dtype

_TEXTS: Final = (Path(__file__).parents[1] / "data" / "lighthouse.txt", Path(__file__).parents[2] / "LICENSE")
_WINDOW_TOKENS: Final = 1024
_STAGES: Final = 3
_LLAMA_CPP_WINDOW: Final = 512  # what llama-perplexity takes if nothing is said
_LLAMA_PERPLEXITY: Final = Path(__file__).parents[2] / ".llama.cpp" / "build" / "bin" / "llama-perplexity"
_LOGITS_ROWS: Final = 64  # at a time, since 262,144 logits take a MiB
_KV_DTYPES: Final[tuple[KVDtype | None, ...]] = (None, "int8")


@dataclass(frozen=True, slots=True)
class Reading:
    """How a model reads a text."""

    perplexity: float
    likeliest: Array  # the likeliest next token at every place, int64


def converted(sources: Mapping[str, SourceTensor], dtype: Dtype) -> dict[str, RawTensor]:
    """The tensors of a checkpoint as a stage gets them from a publication in `dtype`."""
    tensors: dict[str, RawTensor] = {}
    for name, source in sources.items():
        for stored, target in convert_tensor(name, source, dtype).items():
            tensors[stored] = RawTensor(target.dtype, target.shape, memoryview(bytearray(b"".join(target.blocks()))))
    return tensors


def stages(checkpoint: Checkpoint, dtype: Dtype, kv_dtype: KVDtype | None = None) -> list[LayerGroup]:
    """The whole model in groups."""
    config = json.loads(checkpoint.files["config.json"])
    tensors = converted(checkpoint.tensors, dtype)
    layers = config["num_hidden_layers"]
    bounds = [layers * stage // _STAGES for stage in range(_STAGES + 1)]
    groups = []
    for first, last in pairwise(bounds):
        kv_bytes = 2 * 4 * _WINDOW_TOKENS * (last - first) * config["hidden_size"]
        group = build_layer_group("auto", config, dict(tensors), first, last, dtype, "cpu", kv_bytes, kv_dtype=kv_dtype)
        groups.append(group)
    return groups


def read(groups: Sequence[LayerGroup], token_ids: Sequence[int]) -> Reading:
    """Every window of the text by itself; the first token of a window is given, not predicted."""
    log_probability = 0.0
    predicted = 0
    likeliest = []
    for start in range(0, len(token_ids) - 1, _WINDOW_TOKENS):
        window = np.array(token_ids[start : start + _WINDOW_TOKENS])
        logits = groups[-1].logits(_hidden(groups, window))[:-1]
        log_probability += math.fsum(logprob for logprob, _ in log_probabilities(logits, window[1:]))
        predicted += len(window) - 1
        likeliest.append(logits.argmax(axis=-1))
    return Reading(math.exp(-log_probability / predicted), np.concatenate(likeliest))


def _hidden(groups: Sequence[LayerGroup], window: Array) -> Array:
    hidden = window
    for group in groups:
        handle = group.kv.reserve(len(window))
        hidden = group.forward(hidden, [Segment(handle, 0, len(window))])
        group.kv.release(handle)
    return hidden


def rows(checkpoint: Checkpoint, token_ids: Mapping[Path, Sequence[int]]) -> list[str]:
    """One Markdown row per dtype, with keys and values in 8 bits too, and text."""
    table = ["| dtype | text (tokens) | perplexity | against float32 | same likeliest token |", "|---|---|---|---|---|"]
    exact: dict[Path, Reading] = {}
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16", "int8", "q4")
    for dtype, kv_dtype in product(dtypes, _KV_DTYPES):
        groups = stages(checkpoint, dtype, kv_dtype)
        name = dtype + (f", KV in {kv_dtype}" if kv_dtype else "")
        for text, ids in token_ids.items():
            reading = read(groups, ids)
            reference = exact.setdefault(text, reading)
            worse = reading.perplexity / reference.perplexity - 1
            same = (reading.likeliest == reference.likeliest).mean()
            table.append(f"| {name} | {text.name} ({len(ids)}) | {reading.perplexity:.3f} | {worse:+.2%} | {same:.3f} |")
    return table


def rows_of_llama_cpp(
    path: Path, checkpoint: Checkpoint, token_ids: Mapping[Path, Sequence[int]], first_token: int | None
) -> list[str]:
    """One Markdown row per text: a GGUF file as it is, here and by llama-perplexity.

    first_token: what the tokenizer puts before every text.
    """
    table = ["| text (tokens) | kept | llama-perplexity | difference |", "|---|---|---|---|"]
    groups = stages(checkpoint, "kept")
    for text, ids in token_ids.items():
        ours, theirs = read_as_llama_cpp(groups, ids, first_token), perplexity_by_llama_cpp(path, text)
        table.append(f"| {text.name} ({len(ids)}) | {ours:.4f} | {theirs:.4f} | {ours / theirs - 1:+.2%} |")
    return table


def read_as_llama_cpp(groups: Sequence[LayerGroup], token_ids: Sequence[int], first_token: int | None) -> float:
    """The perplexity as llama-perplexity computes it: whole windows, each by itself, and of each only the tokens of its second
    half. first_token: takes the place of each window's first token."""
    log_probability, half, count = 0.0, _LLAMA_CPP_WINDOW // 2, len(token_ids) // _LLAMA_CPP_WINDOW
    for start in range(0, count * _LLAMA_CPP_WINDOW, _LLAMA_CPP_WINDOW):
        window = token_ids[start : start + _LLAMA_CPP_WINDOW]
        beginning = window[0] if first_token is None else first_token
        hidden = _hidden(groups, np.array([beginning, *window[1:]]))
        for first in range(half, _LLAMA_CPP_WINDOW - 1, _LOGITS_ROWS):
            last = min(first + _LOGITS_ROWS, _LLAMA_CPP_WINDOW - 1)
            logits = groups[-1].logits(hidden[first:last])
            log_probability += math.fsum(each for each, _ in log_probabilities(logits, window[first + 1 : last + 1]))
    return math.exp(-log_probability / (count * (_LLAMA_CPP_WINDOW - half - 1)))


def perplexity_by_llama_cpp(path: Path, text: Path) -> float:
    window = str(_LLAMA_CPP_WINDOW)
    command: list[str | Path] = [_LLAMA_PERPLEXITY, "-m", path, "-f", text, "-c", window, "-b", window]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    if not found:
        raise click.ClickException(f"llama-perplexity found nothing: {done.stderr[-500:]}")
    return float(found[1])


@click.command()
@click.option("--model", help="A folder, a GGUF file, or a hub id; without it, the default model.")
@click.option("--text", "texts", type=click.Path(exists=True, path_type=Path), multiple=True, default=_TEXTS)
@click.option("--only-llama-cpp", is_flag=True, help="Compare a GGUF file with llama-perplexity, and nothing else.")
def main(model: str | None, texts: Sequence[Path], only_llama_cpp: bool) -> None:
    """Print Markdown tables of perplexity by dtype and text."""
    path = locate(model or packaged_model())
    checkpoint = open_checkpoint(path)
    tokenizer = Tokenizer.from_buffer(checkpoint.files["tokenizer.json"])
    token_ids = {text: tokenizer.encode(text.read_text()).ids for text in texts}
    first_token = next(iter(tokenizer.encode("").ids), None)
    if only_llama_cpp and not (_LLAMA_PERPLEXITY.is_file() and path.is_file()):
        raise click.ClickException("that takes a GGUF file, and llama-perplexity: make llama-cpp")
    if _LLAMA_PERPLEXITY.is_file() and path.is_file():
        click.echo("\n".join([*rows_of_llama_cpp(path, checkpoint, token_ids, first_token), ""]))
    if only_llama_cpp:
        return
    click.echo("\n".join(rows(checkpoint, token_ids)))


if __name__ == "__main__":
    main()
