"""Every family that transformers' modules run, as a tiny model of its class's defaults: cut, it gives the whole model's tokens.

`make test` tries every third family in one of the ways to cut and to chunk; `make families` tries each in all of them.
"""

import json
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from functions.stage.models.layer_group import Segment
from functions.stage.models.transformers import sliced_model
from functions.stage.models.transformers.catalogue import known_families
from functions.stage.models.transformers.group import TransformersGroup
from functions.stage.models.transformers.outside_caches import OUTSIDE
from functions.stage.models.transformers.self_test import check_cut, tiny_tensors
from storage.checkpoints.decoder_families import DECODER_FAMILIES
from storage.checkpoints.families import NO_TEXT_DECODERS, REFUSED
from storage.checkpoints.model_description import describe_model
from storage.checkpoints.model_source import open_checkpoint
from storage.errors import ArchitectureUnsupported
from storage.loading.weight_loader import RawTensor
from storage.models.checks import check_runnable, check_shapes
from storage.models.model_repository import layer_object
from storage.models.placement import head_matrix, place_tensors
from tests.support.functions.generic_families import GENERIC, default_config
from tests.support.storage import tiny_models

WAYS: Final = list(product((1, 2, 3), (1, 7, 64)))  # stages, tokens of a chunk
PROMPTS: Final = ([*range(10, 80)], [5, 9, 33, 7, 100])
NEW_TOKENS: Final = 6


@pytest.mark.slow
@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("model_type", GENERIC)
def test_a_family_gives_transformers_tokens(model_type: str, wide: bool, tmp_path: Path) -> None:
    whole, checkpoint = saved(model_type, tmp_path)
    expected = [oracle(whole, prompt) for prompt in PROMPTS]
    for stages, chunk in WAYS if wide else [WAYS[GENERIC.index(model_type) % len(WAYS)]]:
        pipeline = published(checkpoint, stages)
        assert generated(pipeline, chunk) == expected, f"{stages} stages, chunks of {chunk}"


def saved(model_type: str, folder: Path) -> tuple[PreTrainedModel, Path]:
    """The whole model, loaded from the folder that it was saved in."""
    config = default_config(model_type)
    tiny_tensors(config, folder)
    whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=sliced_model.attention_of(config)
    ).eval()
    whole.generation_config.eos_token_id = None
    whole.generation_config.pad_token_id = 0
    return whole, folder


@torch.inference_mode()
def oracle(whole: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """The whole model's greedy tokens, with recurrent layers by the path that transformers' modules take for a single token."""
    text, model_type = list(prompt), whole.config.model_type
    cache: Any = None if model_type == "xlstm" else DynamicCache(config=whole.config)
    if model_type in OUTSIDE and cache is not None:  # without a cache, the whole text for each token
        for _ in range(NEW_TOKENS):
            text.append(int(whole(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        return text[len(prompt) :]
    if cache is not None and not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        return tiny_models.greedy(whole, prompt, NEW_TOKENS)
    for position in range(len(prompt) + NEW_TOKENS - 1):
        token = torch.tensor([text[position : position + 1]])
        output = whole(input_ids=token, position_ids=torch.tensor([[position]]), cache=cache, use_cache=True)
        cache = output.cache if cache is None else cache
        if position + 1 == len(text):
            text.append(int(output.logits[0, -1].argmax()))
    return text[len(prompt) :]


def published(folder: Path, stages: int) -> list[TransformersGroup]:
    """The stages of the folder's model, each with the objects that it would read from the store."""
    checkpoint = open_checkpoint(folder)
    check_runnable(checkpoint.config, "float32")
    model = describe_model(checkpoint.config)
    placed = place_tensors(checkpoint.tensors, model)
    check_shapes(checkpoint.config, {name: each.shape for part in placed.values() for name, each in part.items()}, "float32")
    config = json.loads(checkpoint.files["config.json"])
    bounds = sorted({round(model.num_layers * part / stages) for part in range(stages + 1)})  # BLOOM has two layers
    groups = []
    for first, last in pairwise(bounds):
        objects = [layer_object(number) for number in range(first, last)]
        if first == 0 or (last == model.num_layers and head_matrix(placed) is None):
            objects.append("embedding")
        if last == model.num_layers:
            objects.append("head")
        tensors = {
            name: RawTensor(each.dtype, each.shape, memoryview(bytearray(b"".join(each.blocks()))))
            for part in objects
            for name, each in placed[part].items()
        }
        groups.append(TransformersGroup.build(config, tensors, first, last, "float32", "cpu", 2**26))
    return groups


def generated(groups: Sequence[TransformersGroup], chunk: int) -> list[list[int]]:
    """Greedy answers to all prompts, computed in the same passes as far as they have chunks left."""
    texts = [list(prompt) for prompt in PROMPTS]
    ends = [len(prompt) + NEW_TOKENS for prompt in PROMPTS]
    handles = [[group.kv.reserve(end) for group in groups] for end in ends]
    done = [0 for _ in texts]
    while any(len(text) < end for text, end in zip(texts, ends, strict=True)):
        rows = [number for number, text in enumerate(texts) if len(text) < ends[number]]
        lengths = [min(chunk, len(texts[number]) - done[number]) for number in rows]
        states: Any = np.array(
            [t for n, length in zip(rows, lengths, strict=True) for t in texts[n][done[n] : done[n] + length]]
        )
        for stage, group in enumerate(groups):
            segments = [Segment(handles[n][stage], done[n], length) for n, length in zip(rows, lengths, strict=True)]
            states = group.forward(states, segments)
        logits = groups[-1].logits(states)
        for number, length, end in zip(rows, lengths, np.cumsum(lengths), strict=True):
            done[number] += length
            if done[number] == len(texts[number]):
                texts[number].append(int(logits[end - 1].argmax()))
    return [text[len(prompt) :] for text, prompt in zip(texts, PROMPTS, strict=True)]


def test_lists_name_families_of_transformers_and_few_are_refused() -> None:
    known = {family.model_type: family.runs for family in known_families()}
    assert set(REFUSED) == {name for name, runs in known.items() if runs == "refused"}
    # As a row of the table says, also if the class's defaults make heads that are rotated by an odd number (glm4_moe).
    assert {name for name, runs in known.items() if runs == "native"} == DECODER_FAMILIES.keys() & known.keys()
    assert NO_TEXT_DECODERS.isdisjoint(known)
    assert len(REFUSED) <= 15


def test_the_self_test_passes_a_model_that_can_be_cut() -> None:
    check_cut({"model_type": "olmo2"})


def test_the_self_test_says_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here later stages do with their input what the whole model does with embeddings."""
    monkeypatch.setattr(sliced_model.SlicedModel, "_enter", lambda _, __, args, named: (args, named))
    with pytest.raises(ArchitectureUnsupported, match=r"'granite' cut in two gives other logits .* from token 0 on"):
        check_cut({"model_type": "granite", "embedding_multiplier": 12.0})


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "gemma4_text"}, "'gemma4_text' cut in two does not run by transformers' modules: "),
        ({"model_type": "blt"}, "its layers run over patches of bytes"),
        ({"model_type": "llama", "num_attention_heads": 7}, "does not run a tiny copy of this 'llama'"),
    ],
)
def test_the_self_test_refuses_with_a_reason(config: dict[str, Any], why: str) -> None:
    with pytest.raises(ArchitectureUnsupported, match=why):
        check_cut(config)
