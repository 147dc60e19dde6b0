"""Stages that compute each pass with another number of threads: the tokens stay those of the whole model in transformers.

More threads add up partial sums in another order. In float32 a token may differ only where the whole model's two best logits
of that step are closer than 1e-3.
"""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from functions.stage.engine.engine import Engine
from functions.stage.engine.threads import PassThreads
from functions.stage.models.build import build_layer_group
from tests.support.functions.borders import raw
from tests.support.functions.stage_pipeline import CUT, generate
from tests.support.storage import tiny_models

CLOSE_LOGITS = 1e-3
NEW_TOKENS = 24
PROMPT_LENGTHS = (1, 2, 7, 31, 64, 120)
WIDE: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6}
"""Wide enough that torch divides a chunk's matrices between threads; those of the other tiny models it does not."""


class Alternating(PassThreads):
    """One thread, two, one, two, …"""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.used: list[int] = []
        """By pass, as torch says when it is over."""
        self._passes = 0

    def begin(self, now: float) -> int:
        self._passes += 1
        return 2 - self._passes % 2

    def end(self, began: float, now: float) -> None:
        self.used.append(torch.get_num_threads())


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """Threads that are started later compute with as many as were set last, wherever that was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_tokens_are_the_whole_models_while_the_number_of_threads_changes_from_pass_to_pass() -> None:
    model = tiny_models.whole_model("llama", **WIDE)
    threads = [Alternating() for _ in CUT]
    dice = random.Random(3)
    prompts = [[dice.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]
    with running(model, threads) as stages, ThreadPoolExecutor(len(prompts)) as clients:
        asked = [clients.submit(generate, stages, str(prompt), prompt, NEW_TOKENS, chunk=32) for prompt in prompts]
        seen = [answer.result() for answer in asked]
    for prompt, tokens in zip(prompts, seen, strict=True):
        assert_same(model, prompt, tokens)
    for each in threads:
        assert len(each.used) >= NEW_TOKENS
        assert each.used == [1 + number % 2 for number in range(len(each.used))]


@contextmanager
def running(model: PreTrainedModel, threads: list[Alternating]) -> Iterator[list[Engine]]:
    tensors, config = tiny_models.checkpoint_tensors(model), tiny_models.tiny_config("llama", **WIDE)
    with ExitStack() as stack:
        stages = []
        for (first, last), each in zip(CUT, threads, strict=True):
            own = raw(tiny_models.stage_tensors(tensors, first, last))
            group = build_layer_group("llama", config, own, first, last, "float32", "cpu", 2**24)
            stages.append(Engine(group, num_stages=len(CUT), max_merge=4, idle_sequence_seconds=600.0, threads=each))
            stages[-1].start()
            stack.callback(stages[-1].stop)
        yield stages


def assert_same(model: PreTrainedModel, prompt: list[int], seen: list[int]) -> None:
    wanted = tiny_models.greedy(model, prompt, NEW_TOKENS)
    for step, (one, other) in enumerate(zip(seen, wanted, strict=True)):
        if one != other:
            best, second = tiny_models.all_logits(model, prompt + wanted[:step])[-1].topk(2).values.tolist()
            assert best - second < CLOSE_LOGITS, f"{seen} instead of {wanted} from token {step} on"
            return
