"""Layer groups on another device than the CPU: token ids and bytes go in, numpy arrays come out."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from eventing.wire.events import Batch, Row, Sampling, Status, Want
from functions.stage.engine.event_queue import ForwardEvent
from functions.stage.engine.forward_pass import ForwardPass
from functions.stage.models.build import Kind, build_layer_group
from functions.stage.models.floats import DTYPES
from functions.stage.models.layer_group import LayerGroup, Segment
from functions.stage.models.llama.group import LlamaGroup
from functions.stage.models.transformers import group as transformers_group
from tests.support.functions.forward_passes import passes_of
from tests.support.functions.other_device import DEVICE, other_device
from tests.support.functions.stage_pipeline import CUT, batch, drawn, stage_tensors, whole_model
from tests.support.storage import tiny_models

PROMPT = [5, 9, 33, 7, 100, 3, 8, 1, 20, 50, 60, 4, 17]
NAMES: dict[Kind, tuple[str, ...]] = {
    "llama": ("llama", "llama_tied", "mistral_sliding", "qwen3", "smollm3"),
    "transformers": ("llama", "gemma2", "gpt2", "phi3", "olmo2"),
}
CASES = [(kind, name) for kind, names in NAMES.items() for name in names]


@contextmanager
def on_the_device(kind: Kind, name: str, dtype: str = "float32") -> Iterator[list[LayerGroup]]:
    """The pipeline's groups, on a device that is not the CPU."""
    loaded: list[Any] = []
    load = transformers_group.load

    def remember(*arguments: Any) -> Any:
        model = load(*arguments)
        loaded.append(copy.deepcopy(model))
        return model

    def build(device: torch.device) -> list[LayerGroup]:
        config = tiny_models.tiny_config(name)
        parts = [(stage_tensors(name, first, last), first, last) for first, last in CUT]
        return [build_layer_group(kind, config, *part, dtype, device.type, 2**20) for part in parts]

    # transformers loads checkpoints through tensors without data, which the fake device cannot have: load outside of it.
    with patch.object(transformers_group, "load", remember):
        build(torch.device("cpu"))
    with (
        patch.object(transformers_group, "load", lambda *_: loaded.pop(0)),
        other_device(LlamaGroup, transformers_group.TransformersGroup),
    ):
        yield build(DEVICE)


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_and_logits_come_back_as_arrays(kind: Kind, name: str, dtype: str) -> None:
    with on_the_device(kind, name, dtype) as groups:
        states = np.array(PROMPT)
        for group in groups:
            states = group.forward(states, [Segment(group.kv.reserve(20), 0, len(PROMPT))])
            assert (states.dtype, states.shape) == (DTYPES[group.hidden_dtype], (len(PROMPT), 32))
        logits = groups[-1].logits(states)
    assert (type(logits), logits.dtype) == (np.ndarray, np.float32)
    assert logits.shape == (len(PROMPT), tiny_models.VOCAB_SIZE)


def run(passes: Sequence[ForwardPass], into: Batch) -> Batch:
    for forward_pass in passes:
        (into,) = forward_pass.run([ForwardEvent(into, "gateway")])
        assert {row.status for row in into.rows} == {Status.OK}, into.rows
    return into


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_stages_generate_and_score_as_they_do_on_the_cpu(kind: Kind, name: str) -> None:
    """Passes, not engines, whose threads would not see the device."""
    expected = tiny_models.greedy(whole_model(name), PROMPT, 6)
    with on_the_device(kind, name) as groups:
        passes = [passes_of(group) for group in groups]
        tokens = list(PROMPT)
        given = 0
        while len(tokens) < len(PROMPT) + 6:
            new = tokens[given:]
            row = Row("a", 0, given, len(new), Want.TOKEN, Sampling(), 30 if given == 0 else None)
            (answer,) = run(passes, batch([row], new)).rows
            given = len(tokens)
            tokens.extend(drawn(answer))
        scored = run(passes, batch([Row("b", 0, 0, len(PROMPT), Want.LOGPROBS, reserve_tokens=20)], PROMPT)).rows[0].result
    assert tokens[len(PROMPT) :] == expected
    assert scored is not None
    whole = tiny_models.all_logits(whole_model(name), PROMPT).log_softmax(dim=-1)
    assert scored.logprobs == pytest.approx([float(whole[n, token]) for n, token in enumerate(PROMPT[1:])], abs=1e-3)


def test_the_fake_device_refuses_what_a_gpu_refuses() -> None:
    """Otherwise these tests would prove nothing."""
    with other_device():
        there = torch.ones(3).to(DEVICE)
        assert (there[torch.tensor([0, 2])] + 1).cpu().tolist() == [2.0, 2.0]
        for wrong in (
            there.numpy,
            lambda: there + torch.ones(3),
            lambda: torch.ones(3).gather(0, torch.tensor([1]).to(DEVICE)),
            lambda: there.index_select(0, torch.tensor([1])),
        ):
            with pytest.raises(RuntimeError, match=r"numpy|same device"):
                wrong()
