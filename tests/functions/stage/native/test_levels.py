"""All levels of this CPU compute the same except for the order of sums. All compilers give the same bits."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final
from unittest.mock import patch

import pytest
import torch

from functions.stage.native.library import Library, library
from tests.support.functions.group_chain import logits_by_plan, tokens_of
from tests.support.functions.native_models import error, exact_groups, native_groups, torch_groups

TEXTS: Final = {"a": tokens_of(1, 30), "b": tokens_of(2, 21), "c": tokens_of(3, 6)}
PLAN: Final = {"a": (1, 20, 9), "b": (3, 1, 17), "c": (0, 1, 5)}
MODELS: Final = (
    ("llama_biased", "bfloat16"), ("llama_biased", "int8"), ("qwen3", "float32"), ("mistral_sliding", "int8"), ("qwen3", "q4"),
    ("qwen3", "float32/int8"), ("mistral_sliding", "bfloat16/int8"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _level_as_before() -> Iterator[None]:
    before = library().level
    yield
    library().use_level(before)


def test_the_best_level_is_chosen() -> None:
    assert library().level == library().levels[-1]
    assert library().levels[0] == "portable"
    with pytest.raises(ValueError, match="avx1024"):
        library().use_level("avx1024")


@pytest.mark.parametrize(("name", "dtype"), MODELS)
def test_each_level_is_nearer_to_float32_than_torchs_layers_in_bfloat16(name: str, dtype: str) -> None:
    exact = logits_by_plan(exact_groups(name, dtype), TEXTS, PLAN)
    by_torch = error(logits_by_plan(torch_groups(name, "bfloat16"), TEXTS, PLAN), exact)
    best = logits_by_plan(native_groups(name, dtype), TEXTS, PLAN)
    for level in library().levels:
        library().use_level(level)
        found = logits_by_plan(native_groups(name, dtype), TEXTS, PLAN)
        assert error(found, exact) < by_torch * (1.65 if "/" in dtype else 1), level
        assert error(found, best) < by_torch / 4, level


@pytest.mark.parametrize("level", library().levels)
def test_a_sequences_bits_do_not_depend_on_chunks_on_any_level(level: str) -> None:
    library().use_level(level)
    for dtype in ("bfloat16", "float32", "float32/int8"):
        groups = native_groups("mistral_sliding", dtype)
        in_steps = [logits_by_plan(groups, {id: text}, {id: (1,) * len(text)}) for id, text in TEXTS.items()]
        assert torch.equal(logits_by_plan(groups, TEXTS, PLAN), torch.cat(in_steps))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to compare with")
def test_another_compiler_makes_the_same_bits(compiled: Callable[..., Path], own_sources: Sequence[str | Path]) -> None:
    other = Library(str(compiled(("gcc", "-Wno-psabi"), own_sources, ("-O1", "-shared"))))
    for level in library().levels:
        library().use_level(level)
        other.use_level(level)
        for name, dtype in MODELS:
            wanted = logits_by_plan(native_groups(name, dtype), TEXTS, PLAN)
            with patch("functions.stage.models.native.group.library", lambda: other):
                assert torch.equal(logits_by_plan(native_groups(name, dtype), TEXTS, PLAN), wanted), (level, name, dtype)
