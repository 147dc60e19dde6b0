"""int8 by torch's operators: exact products, independent rows, any matrix kept wide."""

from collections.abc import Collection

import pytest
import torch

from functions.stage.models.layer_group import Segment
from functions.stage.models.llama.group import LlamaGroup
from functions.stage.models.llama.linear import Int8Linear, Matrix, linear
from tests.support.functions.borders import forwarded, logits_of
from tests.support.functions.int8_checkpoints import MATRICES, int8_checkpoint, quantized
from tests.support.functions.native_models import finished
from tests.support.storage import tiny_models


def group(name: str, keep_wide: Collection[str] = ()) -> LlamaGroup:
    tensors = tiny_models.checkpoint_tensors(tiny_models.whole_model(name))
    return finished(LlamaGroup(tiny_models.tiny_config(name), 0, 6, "int8", "cpu", 2**20), int8_checkpoint(tensors, keep_wide))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 70])
def test_products_are_those_of_the_quantized_operands(rows: int, biased: bool) -> None:
    weight, scale = quantized(random(96, 200))
    bias = random(96, seed=1) if biased else None
    x = random(rows, 200, seed=2) * torch.logspace(-3, 3, rows).unsqueeze(1)
    row_scale = x.abs().amax(1, keepdim=True) / 127
    steps = (x / row_scale * 127).double()
    # float64 holds the integers and their sums exactly, as the kernel's int32 does
    exact = (steps.trunc() / 127 @ weight.double().T) * scale * row_scale + (0 if bias is None else bias)
    # A value on the border between two steps may fall on either side: one step of a few weights.
    assert ((Int8Linear(weight, scale, bias)(x) - exact).abs() <= 2 * scale * row_scale + 1e-5).all()


def test_rows_of_zeros_or_infinities_do_not_affect_others() -> None:
    layer = Int8Linear(*quantized(random(32, 64)), None)
    x = random(4, 64, seed=3)
    alone = layer(x[3:])
    x[0] = 0
    x[1, 5] = float("inf")
    x[2, 7] = float("nan")
    together = layer(x)
    assert together[0].eq(0).all()
    assert torch.equal(together[3:], alone)


def test_residual_silu_and_product_are_those_of_the_plain_result() -> None:
    layer = Int8Linear(*quantized(random(48, 48)), random(48, seed=4))
    x, other = random(5, 48, seed=5), random(5, 48, seed=6)
    plain = layer(x)
    torch.testing.assert_close(layer.add_to(other, x), plain + other)
    torch.testing.assert_close(layer.silu(x), torch.nn.functional.silu(plain))
    torch.testing.assert_close(layer.times(x, other), plain * other)


def test_stacked_matrices_of_different_dtypes_are_concatenated() -> None:
    wide, narrow = random(16, 32), random(24, 32, seed=1)
    weight, scale = quantized(narrow)
    x = random(3, 32, seed=2)
    stacked = linear([Matrix(wide.bfloat16()), Matrix(weight, scale)], torch.float32)(x)
    assert stacked.dtype == torch.float32
    torch.testing.assert_close(stacked, torch.cat((x @ wide.T, x @ narrow.T), 1), atol=0.2, rtol=0)


@pytest.mark.parametrize("name", ["llama_tied", "llama_biased", "qwen2", "qwen3", "smollm3"])
def test_a_sequences_bits_are_the_same_alone_and_among_eight(name: str) -> None:
    """Matrices are exact whatever stands beside a row; so is attention, which reads each sequence by itself."""
    whole = group(name)
    texts = [torch.randint(128, (9 + 3 * index,), generator=torch.Generator().manual_seed(index)) for index in range(8)]
    alone = [chunk_and_steps(whole, [text])[0] for text in texts]
    together = chunk_and_steps(whole, texts)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def chunk_and_steps(whole: LlamaGroup, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The hidden states of each text: all but its last 4 tokens as one chunk, then token by token."""
    handles = [whole.kv.reserve(len(text)) for text in texts]
    given = [0] * len(texts)
    hidden: list[list[torch.Tensor]] = [[] for _ in texts]
    for step in range(5):
        lengths = [len(text) - 4 if step == 0 else 1 for text in texts]
        inputs = torch.cat([text[at : at + length] for text, at, length in zip(texts, given, lengths, strict=True)])
        segments = [Segment(*segment) for segment in zip(handles, given, lengths, strict=True)]
        for index, part in enumerate(forwarded(whole, inputs, segments).split(lengths)):
            hidden[index].append(part)
            given[index] += lengths[index]
    for handle in handles:
        whole.kv.release(handle)
    return [torch.cat(parts) for parts in hidden]


@pytest.mark.parametrize("keep_wide", [(), ("down_proj", "lm_head"), ("v_proj", "up_proj"), MATRICES])
def test_int8_stays_near_the_model_whichever_matrices_are_kept_wide(keep_wide: Collection[str]) -> None:
    """Its error is under a quarter of how much logits differ among themselves."""
    whole = group("llama", keep_wide)
    text = list(range(40))
    handle = whole.kv.reserve(len(text))
    logits = logits_of(whole, forwarded(whole, text, [Segment(handle, 0, len(text))]))
    exact = tiny_models.all_logits(tiny_models.whole_model("llama"), text)
    assert (logits - exact).square().mean().sqrt() < exact.std() / 4


def test_int8_is_declined_where_its_kernel_does_not_run() -> None:
    with pytest.raises(ValueError, match="int8 runs on CPUs"):
        LlamaGroup(tiny_models.tiny_config("llama"), 0, 6, "int8", "cuda", 2**20)
