"""Families with recurrent layers. Their oracles in transformers: `generate` for tokens, the recurrent path for logits."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pytest
import torch

from functions.stage.models.build import Kind
from functions.stage.models.kv_cache import KVBlocks
from functions.stage.models.layer_group import LayerGroup, Segment
from knative.spec.model_shape import shape_from_config
from knative.spec.sizing import plan_stages
from tests.support.functions.stage_pipeline import build_groups, whole_model
from tests.support.storage import tiny_models

PROMPT = [5, 9, 33, 7, 100, 3, 8, 1, 20, 50, 60, 4, 17]
NEW_TOKENS = 16
TEXT = [(7 * number * number + 3 * number) % tiny_models.VOCAB_SIZE for number in range(70)]
KINDS_AND_NAMES: Final[list[tuple[Kind, str]]] = [
    *(("native", name) for name in tiny_models.NATIVE_RECURRENT),
    *(("transformers", name) for name in tiny_models.RECURRENT),
]
CUTS = {1: ((0, 6),), 2: ((0, 3), (3, 6)), 3: ((0, 2), (2, 3), (3, 6)), 6: tuple((n, n + 1) for n in range(6))}


class Stages:
    """One sequence through layer groups. Each goes back as far as it must, and computes the tokens after that again."""

    def __init__(self, groups: Sequence[LayerGroup], tokens: int = 128) -> None:
        self.groups = groups
        self.handles = [group.kv.reserve(tokens) for group in groups]

    def logits(self, token_ids: Sequence[int], position: int, drafts: int = 0) -> torch.Tensor:
        """Logits of all tokens from `position` on. token_ids: of the whole sequence."""
        held = position
        for group, handle in zip(self.groups, self.handles, strict=True):
            group.kv.truncate(handle, held)
            held = group.kv.length(handle)
        hidden: Any = np.array(token_ids[held:], np.int64)
        for group, handle in zip(self.groups, self.handles, strict=True):
            group.kv.truncate(handle, held)
            assert group.kv.length(handle) == held
            hidden = group.forward(hidden, [Segment(handle, held, len(hidden), draft_tokens=drafts)])
        return torch.from_numpy(self.groups[-1].logits(hidden[position - held :]))


@pytest.mark.parametrize(("kind", "name"), KINDS_AND_NAMES)
def test_any_cut_and_chunks_give_the_whole_models_tokens(kind: Kind, name: str, wide: bool) -> None:
    expected = tiny_models.greedy(whole_model(name), PROMPT, NEW_TOKENS)
    text = PROMPT + expected
    oracle = tiny_models.recurrent_logits(whole_model(name), text[:-1])
    for cut, chunk in ((3, 7), (1, 64), (2, 1), (6, 7))[: 4 if wide else 2]:
        stages = Stages(build_groups(name, CUTS[cut], kind, kv_budget_bytes=2**22))
        logits = []
        for first in range(0, len(PROMPT), chunk):
            logits.append(stages.logits(PROMPT[: first + chunk], first))
        for end in range(len(PROMPT) + 1, len(text)):
            logits.append(stages.logits(text[:end], end - 1))
        assert torch.cat(logits).argmax(-1)[len(PROMPT) - 1 :].tolist() == expected, (cut, chunk)
        # Logits are up to 30; the tiny Qwen3-Next divides by the lengths of keys near zero.
        torch.testing.assert_close(torch.cat(logits), oracle, atol=5e-3 if name == "qwen3_next" else 5e-4, rtol=1e-4)


@pytest.mark.parametrize("name", tiny_models.RECURRENT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plan_knows_what_stages_measure(name: str, dtype: str) -> None:
    shape = shape_from_config(tiny_models.tiny_config(name), name, dtype)
    budget = 2**22
    groups = build_groups(name, kind="auto", dtype=dtype, kv_budget_bytes=budget)
    for group, plan in zip(groups, plan_stages(shape, CUTS[3]), strict=True):
        kv = group.kv
        assert isinstance(kv, KVBlocks)
        assert (kv.layout.token_bytes, kv.layout.state_bytes) == (plan.kv_bytes_per_token, plan.state_bytes)
        tokens = plan.kv_tokens(budget)
        if plan.kv_bytes_per_token:
            pages = 2 * kv.need.block_tokens if name in tiny_models.NATIVE_RECURRENT else 0  # that states take in part
            assert tokens is not None
            assert tokens - pages <= kv.capacity_tokens <= tokens
        else:
            assert tokens is None
            assert kv.capacity_tokens >= 2**20


@pytest.mark.parametrize("name", ["mamba2", "mamba"])
def test_bits_do_not_depend_on_chunks_or_company(name: str) -> None:
    """These have recurrent layers alone."""
    (group,) = build_groups(name, CUTS[1])
    hidden = []
    for chunk in (1, 7, 64):
        handle, other = group.kv.reserve(128), group.kv.reserve(128)
        parts = []
        for first in range(0, len(TEXT), chunk):
            tokens = TEXT[first : first + chunk]
            company = np.array([*tokens, 1, 2, 3], np.int64)
            segments = [Segment(handle, first, len(tokens)), Segment(other, first // chunk * 3, 3)]
            if first // chunk * 3 + 3 > 128:
                company, segments = company[: len(tokens)], segments[:1]
            parts.append(group.forward(company, segments)[: len(tokens)])
        hidden.append(np.concatenate(parts))
    assert np.array_equal(hidden[0], hidden[1])
    assert np.array_equal(hidden[0], hidden[2])


@pytest.mark.parametrize(
    ("kind", "name"), [each for each in KINDS_AND_NAMES if each[1] in ("lfm2", "qwen3_5_text", "mamba2", "falcon_h1")]
)
def test_going_back_computes_from_the_last_checkpoint(kind: Kind, name: str) -> None:
    groups = build_groups(name, CUTS[3], kind, kv_budget_bytes=2**22)
    stages = Stages(groups)
    expected = stages.logits(TEXT, 0)
    for length in (69, 64, 63, 50, 16, 3):
        for group, handle in zip(groups, stages.handles, strict=True):
            group.kv.truncate(handle, length)
            assert group.kv.length(handle) == (64 if length >= 64 else 0), "the last whole block, or nothing"
        torch.testing.assert_close(stages.logits(TEXT, length), expected[length:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1"])
def test_after_a_pass_that_failed_half_way_a_sequence_goes_on_from_its_checkpoint(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of its layers have states of tokens that others never saw."""
    (group,) = build_groups(name, CUTS[1])
    stages = Stages([group])
    expected = tiny_models.recurrent_logits(whole_model(name), TEXT)
    stages.logits(TEXT[:40], 0)
    module = group.kv._modules[2]  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        patched.setattr(module, "_whole", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stages.logits(TEXT, 40)
    group.kv.truncate(stages.handles[0], 40)
    assert group.kv.length(stages.handles[0]) == 32
    torch.testing.assert_close(stages.logits(TEXT, 40), expected[40:], atol=1e-4, rtol=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize(("kind", "name"), KINDS_AND_NAMES)
@pytest.mark.parametrize("accepted", [0, 1, 3, 4])
def test_rejected_draft_tokens_leave_no_trace(kind: Kind, name: str, accepted: int) -> None:
    """4 draft tokens at a time, of which some are right; nothing is computed again by the stages' layers as a whole."""
    plain, group = (build_groups(name, CUTS[1], kind, kv_budget_bytes=2**22)[0] for _ in range(2))
    handle, drafting = plain.kv.reserve(128), group.kv.reserve(128)
    start = np.array(TEXT[:13], np.int64)
    plain.forward(start, [Segment(handle, 0, 13)])
    group.forward(start, [Segment(drafting, 0, 13)])
    position = 13
    near = 5e-3 if name in ("minimax", "zamba") else 1e-4  # five rows at once round otherwise, and their layers amplify it
    while position < 60:
        expected = []
        for at in range(position, position + accepted + 1):
            expected.append(plain.forward(np.array([TEXT[at]]), [Segment(handle, at, 1)]))
        drafts = [*TEXT[position + 1 : position + 1 + accepted], *[99] * (4 - accepted)]
        hidden = group.forward(np.array([TEXT[position], *drafts]), [Segment(drafting, position, 5, draft_tokens=4)])
        np.testing.assert_allclose(hidden[: accepted + 1], np.concatenate(expected), atol=near, rtol=near)
        position += accepted + 1
        group.kv.truncate(drafting, position)
        assert group.kv.length(drafting) == position
    assert isinstance(plain.kv, KVBlocks)
    assert isinstance(group.kv, KVBlocks)
    mine, other = (
        np.frombuffer(kv.state_out(of, position), np.float32) for kv, of in ((group.kv, drafting), (plain.kv, handle))
    )
    near = 0 if kind == "native" else near
    np.testing.assert_allclose(mine, other, atol=near, rtol=near)
    assert len(mine)
