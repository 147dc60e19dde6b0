"""The layers in machine code: nearer to torch's in float32 than torch's in bfloat16 are, and the same in any company.

That bound, 1.1 to 7 % of the length of the logits, finds what is wrong in one place of one layer of six: two heads of a matrix
exchanged, a bias or a gain left out, a window one token too short or too long, a rotation where there is none, each of which
alone moves the exact logits at least 1.7 times as far.
"""

import ctypes
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import Final

import pytest
import torch

from functions.stage.models.layer_group import Segment
from functions.stage.models.llama.group import LlamaGroup
from tests.support.functions.group_chain import GroupChain, by_plan, tokens_of
from tests.support.functions.int8_checkpoints import MATRICES
from tests.support.functions.native_models import NAMES, checkpoint, config, error, exact_groups, native_groups, torch_groups

DTYPES: Final = ("bfloat16", "int8")
# Each column is a pass: of 1 to 5 rows, chunks beside steps, more rows than go through a matrix at once.
PLAN: Final = {
    "a": (1, 2, 2, 3, 3, 7, 1, 9, 1, 8),
    "b": (0, 0, 1, 1, 1, 5, 20, 1, 0, 1),
    "c": (0, 0, 0, 0, 1, 1, 1, 6, 1, 4),
    "d": (0, 0, 0, 0, 0, 9, 1, 1, 66, 3),
}
TEXTS: Final = {id: tokens_of(seed, sum(lengths)) for seed, (id, lengths) in enumerate(PLAN.items())}


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def logits_of(groups: Sequence[LlamaGroup]) -> torch.Tensor:
    chain = GroupChain(groups)
    chain.reserve(*TEXTS, tokens=100)
    return torch.cat(list(by_plan(chain.logits, TEXTS, PLAN).values()))


def test_only_native_layers_share_their_work() -> None:
    assert all(group.shares_work for group in native_groups("llama", "bfloat16"))
    assert not any(group.shares_work for group in torch_groups("llama", "bfloat16"))


@cache
def error_of_torch(name: str) -> float:
    return error(logits_of(torch_groups(name, "bfloat16")), logits_of(exact_groups(name, "bfloat16")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_nearer_to_float32_than_those_of_torchs_layers(name: str, dtype: str) -> None:
    torch.set_num_threads(2)
    exact = logits_of(exact_groups(name, dtype))
    assert error(logits_of(native_groups(name, dtype)), exact) < error_of_torch(name)


@pytest.mark.parametrize("cut", [((0, 6),), ((0, 1), (1, 6))])
@pytest.mark.parametrize("name", ["llama_tied", "smollm3", "qwen2_sliding"])
def test_any_cut_will_do(name: str, cut: Sequence[tuple[int, int]]) -> None:
    exact = logits_of(exact_groups(name, "int8"))
    assert error(logits_of(native_groups(name, "int8", cut)), exact) < error_of_torch(name)


@pytest.mark.parametrize(
    "keep_wide",
    [
        ("down_proj",),
        ("o_proj",),
        ("q_proj",),
        ("gate_proj",),
        ("v_proj", "up_proj"),
        ("q_proj", "k_proj", "v_proj", "lm_head"),
        MATRICES,
    ],
)
def test_any_matrix_of_an_int8_model_may_be_wide(keep_wide: Collection[str]) -> None:
    exact = logits_of(exact_groups("llama_biased", "int8", keep_wide))
    found = logits_of(native_groups("llama_biased", "int8", keep_wide=keep_wide))
    assert error(found, exact) < error_of_torch("llama_biased")


def first_layers(name: str, dtype: str) -> LlamaGroup:
    """That give their hidden states as they are, not rounded for the wire."""
    (group,) = native_groups(name, dtype, ((0, 4),))
    group.hidden_dtype = torch.float32
    return group


def states_of(group: LlamaGroup, ids: Collection[str], plan: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    chain = GroupChain([group])
    chain.reserve(*ids, tokens=100)
    states = by_plan(chain.states, {id: TEXTS[id] for id in ids}, plan)
    for id in ids:
        chain.release(id)
    return states


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "llama_biased", "qwen2_sliding", "qwen3", "smollm3", "mistral_sliding"])
def test_a_sequence_gets_the_same_bits_whatever_runs_beside_it_on_any_threads(name: str, dtype: str) -> None:
    """In other chunks it need not: those of 16 rows and more read keys and values laid out for them."""
    group = first_layers(name, dtype)
    torch.set_num_threads(1)
    chunks = {id: _chunks(len(text), 5 + number) for number, (id, text) in enumerate(TEXTS.items())}
    whole = {id: (len(text),) for id, text in TEXTS.items()}
    for plan in (PLAN, chunks, whole):
        torch.set_num_threads(1)
        alone = {id: states_of(group, [id], plan)[id] for id in TEXTS}
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            together = states_of(group, list(TEXTS), plan)
            for id in TEXTS:
                assert torch.equal(together[id], alone[id]), (id, threads, plan[id])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thread_that_comes_late_holds_up_nobody_and_changes_nothing(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    (group,) = native_groups("llama_biased", dtype, ((2, 5),))
    hidden = torch.randn(75, group.hidden_size, generator=torch.Generator().manual_seed(3)).bfloat16()
    lengths = (1, 70, 1, 3)
    torch.set_num_threads(2)
    wanted = forwarded(group, hidden, lengths)
    threads = LateThreads(group)
    monkeypatch.setattr(group._native, "_openmp", threads)
    assert torch.equal(forwarded(group, hidden, lengths), wanted)
    assert threads.came == [0, 1]


class LateThreads:
    """Two threads in place of OpenMP's: the second comes when the first has returned."""

    def __init__(self, group: LlamaGroup) -> None:
        self.came: list[int] = []
        c_function = ctypes.CFUNCTYPE(ctypes.c_int)
        self._number, self._threads = c_function(lambda: self.came[-1]), c_function(lambda: 2)
        assert group._native is not None
        for name, function in (("thread_number", self._number), ("threads", self._threads)):
            group._native._group[name] = ctypes.cast(function, ctypes.c_void_p).value

    def run(self, function: int, data: int, threads: int) -> None:
        assert threads == 2
        for number in range(threads):
            self.came.append(number)
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(data)


def _chunks(tokens: int, size: int) -> tuple[int, ...]:
    """Equal ones, the last cut short, and nothing afterwards, in as many passes as the longest text needs."""
    return tuple(max(0, min(size, tokens - first)) for first in range(0, 20 * size, size))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_stays_alone_with_it(dtype: str) -> None:
    (group,) = native_groups("llama_biased", dtype, ((2, 5),))
    lengths = (5, 1, 3, 1, 4, 2)
    hidden = torch.randn(sum(lengths), group.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    good = forwarded(group, hidden, lengths).split(lengths)
    hidden[5, 3] = float("inf")
    hidden[8, 60] = float("nan")
    hidden[9] = 3e38  # whose square is infinite
    found = forwarded(group, hidden, lengths).split(lengths)
    assert not found[1].isfinite().any()
    assert not found[2][2].isfinite().any()
    for index in (0, 4, 5):
        assert torch.equal(found[index], good[index])
        assert found[index].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_get_what_biases_make_of_them(dtype: str) -> None:
    (group,), (exact,) = native_groups("llama_biased", dtype, ((0, 6),)), exact_groups("llama_biased", dtype)
    for one in (group, exact):
        assert one._embedding is not None
        one._embedding = torch.zeros_like(one._embedding)
    tokens = torch.arange(5)
    wanted = forwarded(exact, tokens, (1, 4))
    assert wanted.abs().max() > 0.1
    assert error(forwarded(group, tokens, (1, 4)).float(), wanted) < 0.02


def forwarded(group: LlamaGroup, inputs: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """One pass of new sequences."""
    segments = [Segment(group.kv.reserve(length), 0, length) for length in lengths]
    result = group.forward(inputs, segments)
    for segment in segments:
        group.kv.release(segment.handle)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_may_lie_in_memory_in_any_order_and_stay_what_they_are(dtype: str) -> None:
    (group,) = native_groups("llama", dtype, ((2, 5),))
    hidden = torch.randn(6, group.hidden_size, generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = forwarded(group, hidden, (6,))
    turned = hidden.T.contiguous().T
    assert torch.equal(forwarded(group, turned, (6,)), wanted)
    wide = hidden.float()
    assert torch.equal(forwarded(group, wide, (6,)), wanted)
    assert torch.equal(wide, hidden.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_are_held_once_and_in_place(dtype: str) -> None:
    tensors = {name: tensor for name, tensor in checkpoint("llama_biased", dtype).items() if ".layers.3." in name}
    group = LlamaGroup(config("llama_biased"), 3, 4, dtype, "cpu", 2**20)
    given = dict(tensors)
    group.place(given)
    assert not given
    native = group._native
    assert native is not None
    for field, name in (
        ("out", "self_attn.o_proj"),
        ("gate", "mlp.gate_proj"),
        ("up", "mlp.up_proj"),
        ("down", "mlp.down_proj"),
    ):
        assert native._layers[field]["weights"][0] == tensors[f"model.layers.3.{name}.weight"].data_ptr()
    assert not group._layers
    matrices = [tensor for tensor in native._kept if tensor.ndim == 2]
    assert sum(map(torch.Tensor.numel, matrices)) == sum(tensor.numel() for tensor in tensors.values() if tensor.ndim == 2)
