"""Adapters of the tiny models, trained by nobody: PEFT folders with random matrices, and the adapted models as oracles."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

SPREAD = 0.3


def adapted(model: PreTrainedModel, seed: int, **config: Any) -> PeftModel:
    """The model with an adapter whose matrices are drawn at random. It changes `model`: give it a copy.

    config: fields of LoraConfig; by default rank 4 on all linear modules. GPT-2 takes fan_in_fan_out.
    """
    generator = torch.Generator().manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, SPREAD, generator=generator)
    return peft.eval()


def saved(peft: PeftModel, folder: Path) -> Path:
    """Writes adapter_config.json and adapter_model.safetensors into `folder`, and returns it."""
    peft.save_pretrained(str(folder))
    return folder
