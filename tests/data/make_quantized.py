"""Writes quantized.safetensors: small matrices that libraries have quantized, and the values that they dequantize them to.

Run it in an environment of its own, because no test needs these libraries:

    pip install torch numpy safetensors compressed-tensors==0.20.1 bitsandbytes==0.50.2 torchao==0.18.0 nvidia-modelopt==0.47.0
    PYTHONPATH=<AutoAWQ 88e4c76>:<AutoGPTQ 9f7d370> python tests/data/make_quantized.py

A case NAME has the tensors NAME/m.* as a checkpoint has them, and NAME/expected. The metadata has the quantization_config of
each case under its name, and of torchao what it stores for each tensor under NAME/m.weight.
"""

import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

ROWS, COLUMNS = 32, 128
tensors: dict[str, torch.Tensor] = {}
metadata: dict[str, str] = {}


def weights(dtype: torch.dtype, rows: int = ROWS) -> torch.Tensor:
    return (torch.randn(rows, COLUMNS) * torch.rand(rows, 1) * 0.1).to(dtype)


def add(case: str, config: dict, parts: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    for name, tensor in parts.items():
        tensors[f"{case}/m.{name}"] = tensor.detach().clone().contiguous()
    tensors[f"{case}/expected"] = expected.detach().clone().contiguous()
    metadata[case] = json.dumps(config)


def awq() -> None:
    sys.modules["awq.utils.utils"] = types.SimpleNamespace(get_best_device=lambda: "cpu")
    sys.modules["awq.utils.module"] = types.SimpleNamespace(try_import=lambda _: (None, ""))
    for name in ("awq", "awq.modules", "awq.modules.linear"):  # without their __init__, which import a GPU's libraries
        sys.modules[name] = types.ModuleType(name)
        found = [Path(each, *name.split(".")) for each in sys.path if Path(each, *name.split(".")).is_dir()]
        sys.modules[name].__path__ = [str(found[0])]
    sys.modules["awq.utils"] = types.ModuleType("awq.utils")
    sys.modules["awq.utils"].__path__ = [str(Path(sys.modules["awq"].__path__[0], "utils"))]
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    group = 64
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = weights(torch.float16)
    groups = linear.weight.data.float().reshape(ROWS, -1, group)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    made = WQLinear_GEMM.from_linear(linear, 4, group, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())
    parts = {"qweight": made.qweight, "qzeros": made.qzeros, "scales": made.scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    add("awq", config, parts, dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, group).t())


def gptq() -> None:
    sys.modules["auto_gptq"] = types.ModuleType("auto_gptq")
    found = next(each for each in sys.path if Path(each, "auto_gptq").is_dir())
    sys.path.insert(0, str(Path(found, "auto_gptq/nn_modules/qlinear")))
    import qlinear_cuda

    for bits, group, symmetric, act_order in (
        (4, 32, True, False),
        (4, 64, False, True),
        (8, 128, True, False),
        (3, 32, False, False),
    ):
        linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
        linear.weight.data = weights(torch.float16)
        order = torch.randperm(COLUMNS) if act_order else torch.arange(COLUMNS)
        g_idx = torch.empty(COLUMNS, dtype=torch.int32)
        g_idx[order] = (torch.arange(COLUMNS) // group).int()
        maximum = 2**bits - 1
        ends = []
        for each in range(COLUMNS // group):
            of_group = linear.weight.data.float()[:, g_idx == each]
            low, high = of_group.amin(1).clamp(max=0), of_group.amax(1).clamp(min=0)
            if symmetric:
                high = torch.maximum(high, -low)
                low = -high
            scale = (high - low) / maximum
            zero = torch.full_like(scale, (maximum + 1) / 2) if symmetric else (-low / scale).round().clamp(1, maximum)
            ends.append((scale, zero))
        scales, zeros = (torch.stack(each, 1) for each in zip(*ends, strict=True))
        made = qlinear_cuda.QuantLinear(bits, group, COLUMNS, ROWS, False, weight_dtype=torch.float16)
        made.pack(linear, scales.half(), zeros, g_idx)
        parts = {name: getattr(made, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": act_order}
        add(f"gptq-{bits}-{'act-order' if act_order else group}", config, parts, made(torch.eye(COLUMNS).half()).t())


def bitsandbytes() -> None:
    import bitsandbytes.functional as bnb
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    for kind, dtype, block, nested in (
        ("nf4", torch.bfloat16, 64, True),
        ("nf4", torch.float16, 256, False),
        ("fp4", torch.float32, 64, False),
    ):
        packed, state = bnb.quantize_4bit(weights(dtype), blocksize=block, quant_type=kind, compress_statistics=nested)
        parts = {"weight": packed} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        expected = bnb.dequantize_4bit(packed, state)
        if block > COLUMNS:  # the kernel for AVX-512 reads wrong scales if a block is longer than a row
            expected = _dequantize_4bit_compute(packed.reshape(-1), state.absmax, state.code, block, state.shape, dtype)
        add(f"bitsandbytes-{kind}{'-nested' if nested else ''}-{block}", config, parts, expected)
    rows, largest, _ = bnb.int8_vectorwise_quant(weights(torch.float16))
    parts = {"weight": rows, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    expected = bnb.int8_vectorwise_dequant(rows, largest)
    add("bitsandbytes-int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}, parts, expected)


def compressed_tensors() -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def case(name: str, layout: str, dtype: torch.dtype = torch.bfloat16, rows: int = ROWS, **args: object) -> None:
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        weight = weights(dtype, rows)
        state = {"weight": weight}
        strategy = args["strategy"]
        group = args.get("group_size") or COLUMNS
        if strategy == "block":
            height, width = args["block_structure"]
            tiles = torch.nn.functional.pad(weight.float(), (0, 0, 0, -rows % height)).reshape(
                -1, height, COLUMNS // width, width
            )
            low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
        elif strategy == "tensor":
            low, high = weight.float().amin().reshape(1), weight.float().amax().reshape(1)
        else:
            groups = weight.float().reshape(rows, -1, group)
            low, high = groups.amin(-1), groups.amax(-1)
        bits, is_float = args["num_bits"], args["type"] == "float"
        largest = torch.maximum(-low, high)
        limit = {4: 6.0, 8: 448.0}[bits] if is_float else 2 ** (bits - 1) - 1
        if layout.startswith("mx"):
            state["weight_scale"] = torch.exp2((largest / limit).log2().ceil())
        elif layout.startswith("nvfp4"):
            state["weight_global_scale"] = (448 * 6 / largest.max()).reshape(1)
            state["weight_scale"] = (largest * state["weight_global_scale"] / 6).to(torch.float8_e4m3fn).float()
        elif args.get("symmetric", True):
            state["weight_scale"] = (largest / limit).to(dtype)
        else:
            scale = ((high.clamp(min=0) - low.clamp(max=0)) / (2**bits - 1)).to(dtype)
            state["weight_scale"] = scale
            state["weight_zero_point"] = (-(2 ** (bits - 1)) - low.clamp(max=0) / scale).round().to(torch.int8)
        compressor = BaseCompressor.get_value_from_registry(layout)
        parts = compressor.compress(state, scheme)
        expected = compressor.decompress(dict(parts), scheme)["weight"]
        weights_config = json.loads(scheme.weights.model_dump_json())
        groups_config = {"group_0": {"targets": ["Linear"], "weights": weights_config, "format": layout}}
        config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups_config}
        add(name, config, parts, expected)

    case("ct-float-tensor", "float-quantized", num_bits=8, type="float", strategy="tensor")
    case("ct-float-channel", "float-quantized", num_bits=8, type="float", strategy="channel")
    case("ct-float-block", "float-quantized", rows=40, num_bits=8, type="float", strategy="block", block_structure=[16, 32])
    case("ct-int8-channel", "int-quantized", num_bits=8, type="int", strategy="channel")
    case("ct-int8-asymmetric", "int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False)
    for bits, symmetric in ((4, True), (4, False), (8, True), (3, False)):
        kind = "symmetric" if symmetric else "asymmetric"
        case(
            f"ct-pack-{bits}-{kind}", "pack-quantized", num_bits=bits, type="int", strategy="group", group_size=32,
            symmetric=symmetric,
        )  # fmt: skip
    case("ct-pack-4-channel", "pack-quantized", torch.float16, num_bits=4, type="int", strategy="channel")
    case("ct-nvfp4", "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)
    case("ct-mxfp4", "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    case("ct-mxfp8", "mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)


def modelopt() -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = weights(torch.bfloat16)
    made, scale, scale_2 = NVFP4QTensor.quantize(weight, 16)
    parts = {"weight": made._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2, "input_scale": torch.ones(())}
    expected = made.dequantize(dtype=torch.bfloat16, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    add("modelopt-nvfp4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, parts, expected)
    for name, algorithm, scale in (
        ("tensor", "FP8", weight.float().abs().max() / 448),
        ("channel", "FP8_PER_CHANNEL_PER_TOKEN", weight.float().abs().amax(1) / 448),
    ):
        from modelopt.torch.export.quant_utils import to_quantized_weight

        kind = {"FP8": "fp8", "FP8_PER_CHANNEL_PER_TOKEN": "fp8_pc_pt"}[algorithm]
        stored = to_quantized_weight(weight.float(), scale, kind)
        expected = stored.float() * (scale[:, None] if scale.ndim else scale)
        add(
            f"modelopt-fp8-{name}",
            {"quant_method": "modelopt", "quant_algo": algorithm},
            {"weight": stored, "weight_scale": scale},
            expected,
        )


def torchao() -> None:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    for name, config in (
        ("int8", Int8WeightOnlyConfig(version=2)),
        ("int4", IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32), version=2)),
        ("float8", Float8WeightOnlyConfig(version=2)),
    ):
        linear = torch.nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.bfloat16)
        linear.weight.data = weights(torch.bfloat16)
        quantize_(linear, config)
        flat, described = flatten_tensor_state_dict({f"torchao-{name}/m.weight": linear.weight.data})
        parts = {key.removeprefix(f"torchao-{name}/m."): tensor for key, tensor in flat.items()}
        add(f"torchao-{name}", {"quant_method": "torchao"}, parts, linear.weight.dequantize())
        metadata[f"torchao-{name}/m.weight"] = described[f"torchao-{name}/m.weight"]


torch.manual_seed(0)
for make in (awq, gptq, bitsandbytes, compressed_tensors, modelopt, torchao):
    make()
save_file(tensors, Path(__file__).with_name("quantized.safetensors"), metadata)
