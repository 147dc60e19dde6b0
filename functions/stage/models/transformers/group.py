"""A layer group of transformers' own modules, which runs any family in `families`, as fast as transformers does.

transformers builds its causal model class from a config that is cut to the group's layers, without the modules of other stages.
Its loader renames and fuses checkpoint tensors as the family needs, and its causal head computes the logits. Sequences run one
after the other and are never padded together, so their results equal those of the whole model to the bit.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Final, Self

import torch
from torch import nn
from torch.backends.cpu import get_cpu_capability
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel, __version__
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import logging

from functions.stage.models.floats import HIDDEN_DTYPES, Array, Float32, HiddenDtype
from functions.stage.models.layer_group import MissingTensors, Segment
from functions.stage.models.packed_tensors import widen
from functions.stage.models.torch_border import DTYPES, input_tensor, output_array, use_threads, weight_tensor
from functions.stage.models.transformers.cache import TransformersKVCache
from functions.stage.models.transformers.cache_layers import LayerMemory, SequenceCache, run_token_by_token
from functions.stage.models.transformers.long_rope import LongRope
from storage.checkpoints.families import Family, cut_config, family_of, with_floats
from storage.checkpoints.model_description import RECURRENT_CONTEXT_TOKENS
from storage.loading.weight_loader import RawTensor

_OF_WINDOWS: Final = ("layer_types", "sliding_window", "attention_chunk_size")
_HEADS: Final = ("lm_head", "embed_out")
_LAYER_NUMBER: Final = re.compile(r"(?<![^.])\d+(?=\.)")  # the first number in a tensor's name is its layer's
_ALIBI_CONTEXT: Final = 2048  # for configs that state no context, as BLOOM's: the context of its training
_SCORES_AT_ONCE: Final = 2**22  # most numbers in a mask (rows times tokens) or in all scores (times heads)


class TransformersGroup:
    """A LayerGroup, the layers of one stage, that runs them with the modules of transformers. Use `build` to create it."""

    shares_work: Final = False
    native_threads: Final = None
    use_threads = staticmethod(use_threads)
    runs_by = "transformers' modules"

    def __init__(
        self,
        model: PreTrainedModel,
        hidden_dtype: HiddenDtype,
        first_layer: int,
        last_layer: int,
        num_layers: int,
        kv_budget_bytes: int,
    ) -> None:
        config = model.config
        written_by = f"{__version__} torch {torch.__version__} {hidden_dtype} {model.device.type} {get_cpu_capability()}"
        self.first_layer = first_layer
        self.last_layer = last_layer
        self.num_layers = num_layers
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.max_positions = _max_positions(config)
        self.hidden_dtype = hidden_dtype
        self._device: torch.device = model.device
        self._base: nn.Module = model.base_model
        # transformers 5.24 renamed the argument.
        takes = inspect.signature(self._base.forward).parameters
        self._cache_argument = "cache" if "cache" in takes else "past_key_values"
        self._long_rope = LongRope(self._base)
        self.short_context = self._long_rope.short_context
        eager = config._attn_implementation == "eager"
        self._scores_per_token: int = getattr(config, "num_attention_heads", 1) if eager else 1
        self._head = model
        setattr(model, model.base_model_prefix, _GivenHiddenStates(self._base))
        layers = [LayerMemory.of(layer) for layer in DynamicCache(config=config).layers]
        recurrent = [index for index, layer in enumerate(layers) if layer.number_of_states]
        modules = run_token_by_token(self._base, recurrent) if recurrent else []
        self._takes_positions = "position_ids" in takes  # without them some models begin at 0 in each call
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
        """Layers [first_layer, last_layer) of the model that `config` (a config.json) describes.

        tensors: by checkpoint name; at least those of this group, embedding and head included if it has them. Their memory is
        used without a copy if they have the dtype and device already. dtype: of the publication, a float or gguf; matrices in
        blocks become bfloat16. Raises ArchitectureUnsupported, UnsupportedRope, MissingTensors.
        """
        family = family_of(config)
        # A quantized checkpoint was published as plain floats.
        cut = AutoConfig.for_model(
            **{name: value for name, value in with_floats(config).items() if name != "quantization_config"}
        )
        declared = {field.name for field in fields(type(cut))}
        for name in _OF_WINDOWS:
            if name not in declared and name in vars(cut):
                delattr(cut, name)  # the cache would have windows that the family's layers do not have
        num_layers: int = cut.num_hidden_layers
        floats_only = dict(tensors)
        widen(floats_only, HIDDEN_DTYPES[dtype])
        loaded = {name: weight_tensor(tensor) for name, tensor in floats_only.items()}
        own = _own_tensors(loaded, family, cut, first_layer, last_layer == num_layers)
        cut_config(cut, family, first_layer, last_layer)
        hidden_dtype = HIDDEN_DTYPES[dtype]
        model_class = _sliced(MODEL_FOR_CAUSAL_LM_MAPPING[type(cut)], family, first_layer, last_layer, num_layers)
        model = _load(model_class, cut, family, own, DTYPES[hidden_dtype], first_layer).to(device)
        return cls(model, hidden_dtype, first_layer, last_layer, num_layers, kv_budget_bytes)

    @torch.inference_mode()
    def forward(self, inputs: Array, segments: Sequence[Segment]) -> Array:
        given = input_tensor(inputs, self.hidden_dtype).to(self._device)
        parts = torch.split(given, [segment.length for segment in segments])
        outputs = [self._forward_one(part, segment) for part, segment in zip(parts, segments, strict=True)]
        return output_array(torch.cat(outputs).to("cpu", DTYPES[self.hidden_dtype]))

    def _forward_one(self, inputs: torch.Tensor, segment: Segment) -> torch.Tensor:
        """Runs one sequence's segment; a long one in parts, as masks and scores grow with the product of rows and tokens."""
        self._long_rope.choose(segment.is_long)
        cache = self.kv.begin_pass(segment.handle, len(inputs), segment.draft_tokens)
        rows = max(1, _SCORES_AT_ONCE // ((cache.position + len(inputs)) * self._scores_per_token))
        outputs = [self._run(part, cache) for part in torch.split(inputs, rows)]
        self.kv.end_pass(segment.handle)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _run(self, inputs: torch.Tensor, cache: SequenceCache) -> torch.Tensor:
        given = {"input_ids" if self.first_layer == 0 else "inputs_embeds": inputs[None], self._cache_argument: cache}
        end = cache.position + len(inputs)
        if self._takes_positions:
            given["position_ids"] = torch.arange(cache.position, end, device=self._device)[None]
        output: torch.Tensor = self._base(**given, use_cache=True).last_hidden_state[0]
        cache.position = end
        return output

    @torch.inference_mode()
    def logits(self, hidden: Array) -> Float32:
        states = input_tensor(hidden, self.hidden_dtype).to(self._device)
        logits: torch.Tensor = self._head(inputs_embeds=states[None], use_cache=False).logits[0]
        return output_array(logits.float().cpu())

    @torch.inference_mode()
    def _measured(self, layers: Sequence[LayerMemory]) -> list[LayerMemory]:
        """Measures what each layer keeps of a sequence by computing a token."""
        cache = SequenceCache([layer.layer(1) for layer in layers])
        if self.first_layer == 0:
            inputs = torch.zeros(1, dtype=torch.int64, device=self._device)
        else:
            inputs = torch.zeros(1, self.hidden_size, dtype=DTYPES[self.hidden_dtype], device=self._device)
        self._long_rope.choose(is_long=False)
        self._run(inputs, cache)
        return [layer.measured(own) for layer, own in zip(layers, cache.layers, strict=True)]


class _GivenHiddenStates(nn.Module):
    """Replaces the layers of a causal model and returns its input, so that the model turns hidden states into logits."""

    def __init__(self, base: nn.Module) -> None:
        """base: the replaced module. Some causal models read numbers from it, as FalconH1's reads the logits' multiplier."""
        super().__init__()
        self.__dict__["base"] = base  # not as a part of this module, which would have its weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["base"], name)

    @property
    def decoder(self) -> nn.Module:
        """OPT's causal model calls this attribute instead of the module itself."""
        return self

    def forward(self, *_: object, inputs_embeds: torch.Tensor, **__: object) -> "_HiddenStates":
        return _HiddenStates(last_hidden_state=inputs_embeds)


class _HiddenStates(MoeModelOutputWithPast):  # type: ignore[misc]
    """The output of `_GivenHiddenStates`. It has all fields that any family's causal model reads from its layers' output."""

    cross_attentions = None


class _Zero(nn.Module):
    """Replaces position embeddings, which only the first stage adds."""

    def forward(self, *_: object, **__: object) -> torch.Tensor:
        return torch.zeros(())


def _sliced(
    model_class: type[PreTrainedModel], family: Family, first_layer: int, last_layer: int, num_layers: int
) -> type[PreTrainedModel]:
    """A subclass of the model class that creates no modules of other stages, so that no memory is spent on them."""

    def __init__(self: PreTrainedModel, config: Any) -> None:
        model_class.__init__(self, config)
        owner = next(module for module in self.base_model.modules() if hasattr(module, family.layers))
        if first_layer > 0:
            _replace(owner, family.before, nn.Identity)
            _replace(owner, family.added_before, _Zero)
        if last_layer < num_layers:
            _replace(owner, family.after, nn.Identity)
            _replace(self, ("lm_head",), nn.Identity)
        if config.model_type == "gpt2" and config.scale_attn_by_inverse_layer_idx:
            for number, block in enumerate(owner.h):
                block.attn.scaling *= (number + 1) / (first_layer + number + 1)

    # transformers finds a family's checkpoint conversion by the name of the class.
    return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})


def _replace(owner: nn.Module, names: Sequence[str], replacement: type[nn.Module]) -> None:
    """Replaces the modules `names` of `owner`, unless they are None."""
    for name in names:
        if getattr(owner, name) is not None:
            setattr(owner, name, replacement())


def _own_tensors(
    tensors: Mapping[str, torch.Tensor], family: Family, config: Any, first_layer: int, is_last: bool
) -> dict[str, torch.Tensor]:
    """The tensors that this group needs, their layers numbered from 0. A tied head is the embedding under the head's name."""
    own: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        modules = set(name.split("."))
        if _LAYER_NUMBER.search(name):
            own[_LAYER_NUMBER.sub(lambda number: str(int(number[0]) - first_layer), name, count=1)] = tensor
        elif first_layer > 0 and modules.intersection(family.before + family.added_before):
            if is_last and config.tie_word_embeddings and family.before[0] in modules:
                own.setdefault("lm_head.weight", tensor)
        elif is_last or not modules.intersection((*family.after, *_HEADS)):
            own[name] = tensor
    return own


def _load(
    model_class: type[PreTrainedModel],
    config: Any,
    family: Family,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype,
    first_layer: int,
) -> Any:
    """Creates the model and loads its tensors. Raises MissingTensors if names or shapes differ from what the config says.

    first_layer: added to layer numbers in error messages, so that they are those of the checkpoint.
    """

    def whole(name: str) -> str:
        return _LAYER_NUMBER.sub(lambda number: str(int(number[0]) + first_layer), name, count=1)

    logging.disable_progress_bar()
    model, found = model_class.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        attn_implementation=family.attention,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    for name, seen, expected in sorted(found["mismatched_keys"]):
        raise MissingTensors(f"{config.model_type}: {whole(name)} is {list(seen)}, and the config makes it {list(expected)}")
    for trouble in ("missing_keys", "unexpected_keys"):
        if found[trouble]:
            raise MissingTensors(
                f"{config.model_type}: {trouble.replace('_keys', '')} tensors: {sorted(map(whole, found[trouble]))[:8]}"
            )
    return model


def _max_positions(config: Any) -> int:
    stated = getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", None)
    return int(stated or (_ALIBI_CONTEXT if hasattr(config, "num_attention_heads") else RECURRENT_CONTEXT_TOKENS))
