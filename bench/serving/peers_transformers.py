"""transformers as a peer of `bench.serving`: a process that loads the whole model in bf16 and answers one command a line.

    python -m bench.serving.peers_transformers MODEL     a GGUF file or a folder

Commands and answers are JSON lines on stdin and stdout. It has a process of its own, so that threads and memory are as without
Lamina, and its CPU time can be measured.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from storage.checkpoints.model_source import open_checkpoint
from storage.models.conversion import convert_tensor

_BANDWIDTH_BYTES: Final = 2**30
_PAD: Final = 0
_NEVER: Final = -1  # no token has this id: nothing ends before its length

Asked = list[dict[str, Any]]  # `token_ids` and `max_tokens` of each request


class _Moments(BaseStreamer):  # type: ignore[misc]  # transformers has no types
    """Records when tokens came; the first call brings the prompt."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        pass


def load(file: Path) -> PreTrainedModel:
    """The published weights in bf16; `from_pretrained(gguf_file=…)` would leave them packed and compute in float32."""
    if file.is_dir():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(file, dtype=torch.bfloat16)
        return model.eval()
    checkpoint = open_checkpoint(file)
    tensors: dict[str, torch.Tensor] = {}
    for name, source in checkpoint.tensors.items():
        for stored, target in convert_tensor(name, source, "bfloat16", ()).items():
            tensors[stored] = torch.frombuffer(bytearray(b"".join(target.blocks())), dtype=torch.bfloat16).view(target.shape)
    config = json.loads(checkpoint.files["config.json"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{file}: transformers lacks {missing} and has no place for {unexpected}")
    return model.eval()


def generate(model: PreTrainedModel, requests: Asked) -> dict[str, Any]:
    """Runs all requests as one static batch: prompts padded on the left, as many steps as the longest answer has tokens."""
    width, steps = max(len(each["token_ids"]) for each in requests), max(each["max_tokens"] for each in requests)
    ids = torch.tensor([[_PAD] * (width - len(each["token_ids"])) + each["token_ids"] for each in requests])
    mask = torch.tensor([[0] * (width - len(each["token_ids"])) + [1] * len(each["token_ids"]) for each in requests])
    config = GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=_PAD, eos_token_id=None, bos_token_id=None)
    streamer = _Moments()
    began = time.perf_counter()
    # A streamer takes one sequence only; of a batch only the end is timed.
    model.generate(ids, attention_mask=mask, generation_config=config, streamer=streamer if len(requests) == 1 else None)
    ended = time.perf_counter()
    moments = [moment - began for moment in streamer.moments[1:]]
    return _answer(ended - began, requests, moments[:1], [moments])


def generate_batch(model: PreTrainedModel, requests: Asked) -> dict[str, Any]:
    """Continuous batching, each request with its own length."""
    longest = max(each["max_tokens"] for each in requests)
    config = GenerationConfig(max_new_tokens=longest, do_sample=False, pad_token_id=_PAD, eos_token_id=_NEVER)
    manager = model.init_continuous_batching(config, ContinuousBatchingConfig())
    manager.start()
    try:
        began = time.perf_counter()  # by which the library stamps its tokens, too
        for each in requests:
            manager.add_request(each["token_ids"], max_new_tokens=each["max_tokens"], record_timestamps=True)
        results: list[Any] = []
        while len(results) < len(requests):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                results.append(result)
            elif result is None and not manager.is_running():
                raise RuntimeError("generate_batch gave up")
        ended = time.perf_counter()
    finally:
        manager.stop(block=True, timeout=10)
    stamps = [[stamp - began for stamp in result.timestamps] for result in results]
    return _answer(ended - began, requests, [each[0] for each in stamps], stamps)


def bandwidth(_: PreTrainedModel, __: Asked) -> dict[str, Any]:
    """Bytes per second that all cores together read from memory, the best of five."""
    memory = torch.ones(_BANDWIDTH_BYTES // 8, dtype=torch.int64)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        memory.max()
        seconds.append(time.perf_counter() - began)
    return {"bytes_per_second": _BANDWIDTH_BYTES / min(seconds)}


def _answer(seconds: float, requests: Asked, first: list[float], moments: list[list[float]]) -> dict[str, Any]:
    gaps = [later - earlier for each in moments for earlier, later in pairwise(each)]
    tokens = sum(each["max_tokens"] for each in requests)
    return {"seconds": seconds, "tokens": tokens, "first_token_seconds": first, "gap_seconds": gaps}


_COMMANDS: Final[dict[str, Callable[[PreTrainedModel, Asked], dict[str, Any]]]] = {
    "generate": generate,
    "generate_batch": generate_batch,
    "bandwidth": bandwidth,
}


def main(path: str) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with _only_answers_on_stdout() as answer:
        model = load(Path(path))
        answer({"ready": True})
        for line in sys.stdin:
            command = json.loads(line)
            with torch.inference_mode():
                answer(_COMMANDS[command["do"]](model, command.get("requests", [])))


@contextlib.contextmanager
def _only_answers_on_stdout() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Redirects the output of libraries to stderr."""
    with os.fdopen(os.dup(1), "w", buffering=1) as stdout:
        os.dup2(2, 1)
        yield lambda document: print(json.dumps(document), file=stdout, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
