"""The language model of a checkpoint that also sees, published alone, gives the whole model's tokens for text."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from functions.stage.models.build import build_layer_group, check_cut
from knative.commands.push import push
from storage.checkpoints.model_source import open_checkpoint
from storage.errors import ArchitectureUnsupported, CheckpointInvalid
from storage.loading.weight_loader import RawTensor
from storage.models.publisher import plan_publication
from tests.support.functions.stage_pipeline import GroupPipeline
from tests.support.storage import tiny_models

PROMPT: Final = [5, 9, 33, 7, 100, 3, 8, 1, 20, 50, 60, 4, 17]
_SEEING: Final = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# Model type: the tiny model of its text part, the type of its vision part, other keys.
MODELS: Final[dict[str, tuple[str, str, dict[str, Any]]]] = {
    "llava": ("llama", "clip_vision_model", {}),
    "gemma3": ("gemma3_text", "siglip_vision_model", {"mm_tokens_per_image": 4}),
    "gemma4": ("gemma4_text", "gemma4_vision", {"image_token_id": 126}),
    "idefics3": ("llama_tied", "idefics3_vision", {"tie_word_embeddings": True}),
}


def save(model_type: str, folder: Path) -> Any:
    text, vision, others = MODELS[model_type]
    config = CONFIG_MAPPING[model_type](
        text_config=tiny_models.given_fields(text),
        vision_config={"model_type": vision, **_SEEING},
        **{"image_token_id": 127, **others},
    )
    model = AutoModelForImageTextToText.from_config(config)
    tiny_models.redraw(model, 0)
    model.save_pretrained(folder)
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    whole.generation_config.eos_token_id = None
    whole.generation_config.pad_token_id = 0
    return whole


@pytest.mark.sampled
@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("cut", [(0, 6), (0, 2, 6), (0, 1, 4, 6)])
def test_text_gives_the_whole_models_tokens(model_type: str, cut: tuple[int, ...], tmp_path: Path) -> None:
    expected = tiny_models.greedy(save(model_type, tmp_path), PROMPT, 12)
    planned = plan_publication(tmp_path, "float32", text_only=True, check_cut=check_cut)
    checkpoint = planned.checkpoint
    tensors = {
        name: RawTensor(each.dtype, each.shape, memoryview(bytearray(b"".join(each.blocks()))))
        for name, each in checkpoint.tensors.items()
    }
    config = json.loads(checkpoint.files["config.json"])
    pipeline = GroupPipeline(
        [
            build_layer_group(
                "auto", config, tiny_models.stage_tensors(tensors, first, last), first, last, "float32", "cpu", 2**20
            )
            for first, last in pairwise(cut)
        ]
    )
    token_ids = list(PROMPT)
    logits = pipeline.logits(token_ids, 0)
    for _ in range(12):
        token_ids.append(int(logits[-1].argmax()))
        logits = pipeline.logits(token_ids[-1:], len(token_ids) - 1)
    assert token_ids[len(PROMPT) :] == expected


def test_push_says_what_is_left_out(tmp_path: Path) -> None:
    save("gemma3", tmp_path)
    run = CliRunner().invoke(push, [str(tmp_path), "--text-only", "--dry-run"], catch_exceptions=False)
    assert "gemma3_text, 6 layers" in run.output
    assert re.search(r"^lost: .*multi_modal_projector \(\d+ bytes\); vision_tower \(\d+ bytes\)", run.output, re.MULTILINE)


def test_without_being_asked_the_model_is_refused_and_the_way_named(tmp_path: Path) -> None:
    save("llava", tmp_path)
    with pytest.raises(
        ArchitectureUnsupported, match="'llava' also sees or hears: publish its language model alone, by push --text"
    ):
        plan_publication(tmp_path, "float32")


def test_a_model_without_a_text_part_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointInvalid, match="has no text_config with a model_type: publish the whole model"):
        open_checkpoint(tmp_path, text_only=True)
