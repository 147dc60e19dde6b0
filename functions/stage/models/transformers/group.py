"""A layer group of transformers' own modules. Runs any family that stages serve, as fast as transformers does.

transformers builds its causal model class without the modules of other stages (`sliced_model`). Its loader renames and fuses
checkpoint tensors as the family needs, and its causal head computes the logits. Sequences run one after the other and are never
padded together, so their results equal those of the whole model to the bit.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, Self

import torch
from torch import nn
from torch.backends.cpu import get_cpu_capability
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, __version__
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from functions.stage.models.adapters import WrongAdapter, low_ranks
from functions.stage.models.floats import HIDDEN_DTYPES, Array, Float32, HiddenDtype
from functions.stage.models.layer_group import PreparedAdapter, Segment
from functions.stage.models.packed_tensors import join_experts, widen
from functions.stage.models.torch_adapters import TorchLowRank
from functions.stage.models.torch_border import DTYPES, input_tensor, output_array, use_threads, weight_tensor
from functions.stage.models.transformers import outside_caches
from functions.stage.models.transformers.cache import TransformersKVCache
from functions.stage.models.transformers.cache_layers import LayerMemory, SequenceCache, run_token_by_token
from functions.stage.models.transformers.long_rope import LongRope
from functions.stage.models.transformers.sliced_model import SlicedModel, cache_argument, load
from storage.checkpoints.families import check_served, layers_key, part_of, with_floats
from storage.checkpoints.model_description import RECURRENT_CONTEXT_TOKENS
from storage.loading.weight_loader import RawTensor

_OF_WINDOWS: Final = ("layer_types", "sliding_window", "attention_chunk_size")
_ALIBI_CONTEXT: Final = 2048  # for configs that state no context, as BLOOM's: the context of its training
_SCORES_AT_ONCE: Final = 2**22  # most numbers in a mask (rows times tokens) or in all scores (times heads)


class TransformersGroup:
    """Implements `LayerGroup` with the modules of transformers. Use `build` to create it."""

    shares_work: Final = False
    takes_token_ids: Final = False
    native_threads: Final = None
    use_threads = staticmethod(use_threads)
    runs_by = "transformers' modules"

    def __init__(
        self,
        model: PreTrainedModel,
        hidden_dtype: HiddenDtype,
        first_layer: int,
        last_layer: int,
        kv_budget_bytes: int,
    ) -> None:
        config = model.config
        written_by = f"{__version__} torch {torch.__version__} {hidden_dtype} {model.device.type} {get_cpu_capability()}"
        self.first_layer = first_layer
        self.last_layer = last_layer
        self.num_layers: int = getattr(config, layers_key(config.model_type))
        self.vocab_size: int = config.vocab_size
        self.max_positions = _max_positions(config)
        self.hidden_dtype = hidden_dtype
        self._device: torch.device = model.device
        self._slice = SlicedModel(model, first_layer, self.num_layers)
        self.hidden_size = self._slice.width
        base = self._slice.base
        self._linear_modules = {
            f"{self._slice.base_name}.{name}": module
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and part_of(f"{name}.weight") is not None
        }
        self._adapters: dict[int, Mapping[str, TorchLowRank]] = {}
        self._adapter = 0  # number of the adapter of the sequence that runs; 0: none
        self._hooked: set[str] = set()
        self._running = outside_caches.Running()
        self._model_type: str = config.model_type
        self._cache_argument = cache_argument(base)
        self._takes_positions = (
            "position_ids" in inspect.signature(base.forward).parameters
        )  # without them some models begin at 0 in each call
        self._long_rope = LongRope(base)
        self.short_context = self._long_rope.short_context
        eager = config._attn_implementation == "eager"
        self._scores_per_token: int = getattr(config, "num_attention_heads", 1) if eager else 1
        self._head = model
        setattr(model, self._slice.base_name, _GivenHiddenStates(base))
        layers = outside_caches.memories(config, first_layer, last_layer)
        modules = outside_caches.bring_in(base, self._slice.layers, first_layer, self._running)
        if modules is None:
            recurrent = [number for number, layer in enumerate(layers) if layer.is_own and layer.number_of_states]
            modules = run_token_by_token(base, recurrent) if recurrent else []
        self.kv = TransformersKVCache(kv_budget_bytes, self._measured(layers), modules, written_by)

    @classmethod
    def build(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, RawTensor],
        first_layer: int,
        last_layer: int,
        dtype: str,
        device: torch.device | str,
        kv_budget_bytes: int,
    ) -> Self:
        """Builds layers [first_layer, last_layer) of the model that `config` (a config.json) describes.

        tensors: by checkpoint name, at least all of this group. The first group also needs the embedding, and the last one the
        head. Tensors that already have the dtype and device are used without a copy. dtype: of the published model, a float or
        kept; matrices in blocks become bfloat16. Raises ArchitectureUnsupported, UnsupportedRope or MissingTensors.
        """
        check_served(config)
        known = CONFIG_MAPPING[config["model_type"]].from_dict(_understood(config))
        floats_only = dict(tensors)
        widen(floats_only, HIDDEN_DTYPES[dtype])
        join_experts(config["model_type"], floats_only)
        loaded = {name: weight_tensor(tensor) for name, tensor in floats_only.items()}
        hidden_dtype = HIDDEN_DTYPES[dtype]
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(known)]
        model = load(model_class, known, loaded, DTYPES[hidden_dtype], first_layer, last_layer).to(device)
        return cls(model, hidden_dtype, first_layer, last_layer, kv_budget_bytes)

    def prepare_adapter(self, tensors: Mapping[str, RawTensor]) -> PreparedAdapter:
        dtype = DTYPES[self.hidden_dtype]
        found = low_ranks(tensors, self.hidden_dtype)
        for name, low in found.items():
            module = self._linear_modules.get(name)
            shape = None if module is None else _shape(module)
            if shape != (len(low.b), low.a.shape[1]):
                seen = f"[{len(low.b)}, {low.a.shape[1]}]"
                raise WrongAdapter(
                    f"the adapter's {name} is {seen}, and the model's {list(shape) if shape else 'no linear module'}"
                )
        share = {name: TorchLowRank.of(low, dtype, self._device) for name, low in found.items()}
        return PreparedAdapter(share, sum(low.bytes for low in share.values()))

    def place_adapter(self, number: int, prepared: PreparedAdapter | None) -> None:
        if prepared is None:
            self._adapters.pop(number, None)
            return
        for name in prepared.share.keys() - self._hooked:  # once for all adapters of a module
            self._linear_modules[name].register_forward_hook(partial(self._add_adapter, name))
            self._hooked.add(name)
        self._adapters[number] = prepared.share

    def _add_adapter(self, name: str, _: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Adds the adapter of the sequence that runs to the output of a module. Torch calls this as a forward hook."""
        low = self._adapters.get(self._adapter, {}).get(name)
        return output if low is None else output + low(args[0])

    @torch.inference_mode()
    def forward(self, inputs: Array, segments: Sequence[Segment]) -> Array:
        given = input_tensor(inputs, self.hidden_dtype).to(self._device)
        parts = torch.split(given, [segment.length for segment in segments])
        outputs = [self._forward_one(part, segment) for part, segment in zip(parts, segments, strict=True)]
        return output_array(torch.cat(outputs).to("cpu", DTYPES[self.hidden_dtype]))

    def _forward_one(self, inputs: torch.Tensor, segment: Segment) -> torch.Tensor:
        """Runs the segment of one sequence.

        A long segment runs in parts, because masks and scores grow with the product of its length and the context.
        """
        self._long_rope.choose(segment.is_long)
        self._adapter = segment.adapter
        cache = self.kv.begin_pass(segment.handle, len(inputs), segment.draft_tokens)
        rows = max(1, _SCORES_AT_ONCE // ((cache.position + len(inputs)) * self._scores_per_token))
        outputs = [self._run(part, cache) for part in torch.split(inputs, rows)]
        self.kv.end_pass(segment.handle, segment.draft_tokens)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _run(self, inputs: torch.Tensor, cache: SequenceCache) -> torch.Tensor:
        self._running.cache = cache
        given = outside_caches.arguments(self._model_type, self._cache_argument, cache)
        end = cache.position + len(inputs)
        if self._takes_positions:
            given["position_ids"] = torch.arange(cache.position, end, device=self._device)[None]
        output = self._slice(inputs, **given)
        cache.go_to(end)
        return output

    @torch.inference_mode()
    def logits(self, hidden: Array) -> Float32:
        states = input_tensor(hidden, self.hidden_dtype).to(self._device)
        logits: torch.Tensor = self._head(inputs_embeds=states[None], use_cache=False).logits[0]
        return output_array(logits.float().cpu())

    @torch.inference_mode()
    def _measured(self, layers: Sequence[LayerMemory]) -> list[LayerMemory]:
        """Computes one token, and returns the descriptions of layers with the sizes of what each layer keeps."""
        cache = SequenceCache(layers, 1)
        if self.first_layer == 0:
            inputs = torch.zeros(1, dtype=torch.int64, device=self._device)
        else:
            inputs = torch.zeros(1, self.hidden_size, dtype=DTYPES[self.hidden_dtype], device=self._device)
        self._long_rope.choose(is_long=False)
        self._run(inputs, cache)
        return [layer.measured(own) for layer, own in zip(layers, cache.layers, strict=True)]


def _shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Returns (outputs, inputs) of a linear module."""
    outs, width = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
    return outs, width


class _GivenHiddenStates(nn.Module):
    """Stands in for the layers of a causal model and returns its input, so that the model only computes logits from it."""

    def __init__(self, base: nn.Module) -> None:
        """Stands in for `base`. Some causal models read attributes of `base`, such as FalconH1's multiplier of logits."""
        super().__init__()
        self.__dict__["base"] = base  # not as a submodule, whose weights this module would then have

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["base"], name)

    @property
    def decoder(self) -> nn.Module:
        """This object, because OPT's causal model calls the attribute `decoder` instead of the module."""
        return self

    def forward(self, *_: object, inputs_embeds: torch.Tensor, **__: object) -> "_HiddenStates":
        return _HiddenStates(last_hidden_state=inputs_embeds)


class _HiddenStates(MoeModelOutputWithPast):  # type: ignore[misc]
    """The output of `_GivenHiddenStates`, with all fields that the causal model of any family reads."""

    cross_attentions = None
    state = None
    shared_kv_states = None


def _understood(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json without fields that would mislead transformers.

    These are sliding windows of a family that has none: the cache would apply them, and the layers would not. It is also the
    quantization, because a quantized checkpoint was published as plain floats.
    """
    default = CONFIG_MAPPING[config["model_type"]]()
    strange = {"quantization_config"}.union(name for name in _OF_WINDOWS if not hasattr(default, name))
    return {name: value for name, value in with_floats(config).items() if name not in strange}


def _max_positions(config: Any) -> int:
    stated = getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", None)
    return int(stated or (_ALIBI_CONTEXT if hasattr(config, "num_attention_heads") else RECURRENT_CONTEXT_TOKENS))
