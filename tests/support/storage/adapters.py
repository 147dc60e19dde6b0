"""Adapters of the tiny models with random matrices: PEFT models, which are the oracles, and their folders."""

from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

_SPREAD: Final = 0.3
_PREFIX: Final = "base_model.model."


def adapted(model: PreTrainedModel, seed: int, **config: Any) -> PeftModel:
    """The model with an adapter whose matrices are drawn at random. It changes `model`: give it a copy.

    config: fields of LoraConfig; by default rank 4 on all linear modules. GPT-2 takes fan_in_fan_out.
    """
    generator = torch.Generator().manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, _SPREAD, generator=generator)
    return peft.eval()


def saved(peft: PeftModel, folder: Path) -> Path:
    """Writes adapter_config.json and adapter_model.safetensors into `folder`, and returns it."""
    peft.save_pretrained(str(folder))
    return folder


def stored_tensors(peft: PeftModel) -> dict[str, torch.Tensor]:
    """The tensors that a publication of the adapter has."""
    state = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(peft).items()}
    tensors = {name.removeprefix(_PREFIX).removesuffix(".weight"): tensor for name, tensor in state.items()}
    for name, module in peft.named_modules():
        if hasattr(module, "lora_A"):
            tensors[f"{name.removeprefix(_PREFIX)}.lora_scale"] = torch.tensor(module.scaling["default"], dtype=torch.float32)
    return tensors
