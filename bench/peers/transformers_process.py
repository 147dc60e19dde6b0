"""transformers as a peer of `bench.peers`: a process that loads a model in bf16 and answers one list of requests a line.

    python -m bench.peers.transformers_process MODEL     a GGUF file or a folder

Requests and answers are JSON lines on stdin and stdout.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from storage.checkpoints.model_source import open_checkpoint
from storage.models.conversion import convert_tensor

_PAD: Final = 0


def load(file: Path) -> PreTrainedModel:
    """The published weights in bf16; `from_pretrained(gguf_file=…)` would leave them packed and compute in float32."""
    if file.is_dir():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(file, dtype=torch.bfloat16)
        return model.eval()
    checkpoint = open_checkpoint(file)
    tensors: dict[str, torch.Tensor] = {}
    for name, source in checkpoint.tensors.items():
        for stored, target in convert_tensor(name, source, "bfloat16").items():
            tensors[stored] = torch.frombuffer(bytearray(b"".join(target.blocks())), dtype=torch.bfloat16).view(target.shape)
    config = json.loads(checkpoint.files["config.json"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{file}: transformers lacks {missing} and has no place for {unexpected}")
    return model.eval()


def generate(model: PreTrainedModel, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs all requests as one static batch: prompts padded on the left, as many steps as the longest answer has tokens."""
    width, steps = max(len(each["token_ids"]) for each in requests), max(each["max_tokens"] for each in requests)
    ids = torch.tensor([[_PAD] * (width - len(each["token_ids"])) + each["token_ids"] for each in requests])
    mask = torch.tensor([[0] * (width - len(each["token_ids"])) + [1] * len(each["token_ids"]) for each in requests])
    config = GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=_PAD, eos_token_id=None, bos_token_id=None)
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, generation_config=config)
    return {"seconds": time.perf_counter() - began, "tokens": sum(each["max_tokens"] for each in requests)}


def main(path: str) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    model = load(Path(path))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(generate(model, json.loads(line)["requests"])), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
