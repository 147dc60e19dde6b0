"""Builds the part of a transformers model that one stage runs, in the same way for any decoder.

The causal model class is built with the whole model's config, so that each layer is of the kind that its number says. Then the
layers of other stages are removed, and so are embedding or head if this stage does not run them. Hooks put hidden states in at
the stage's first layer and take them out at its last layer, whatever the model does around its layers.
"""

import copy
import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from functions.stage.models.layer_group import MissingTensors
from storage.checkpoints.families import EMBEDDING_MODULES, EMBEDDINGS_PASSED_ON, HEAD_MODULES, layers_key, part_of
from storage.errors import ArchitectureUnsupported


class SlicedModel:
    """Runs the layers of one stage of a causal model. The first stage also runs the embedding, the last the final norm."""

    def __init__(self, model: PreTrainedModel, first_layer: int, num_layers: int) -> None:
        """Registers the hooks on `model`, which `load` returned. num_layers: of the whole model."""
        self.model = model
        (layers,) = (module for module in model.modules() if isinstance(module, _OwnLayers))
        self.layers: nn.ModuleList = layers
        # Not `base_model`, which some classes name wrongly.
        self.base_name, self.base = next(
            (name, child) for name, child in model.named_children() if any(module is layers for module in child.modules())
        )
        self._is_first, self._is_last = first_layer == 0, first_layer + len(layers) == num_layers
        self._given = self._left = self._embeddings = torch.empty(0)
        self._hidden_size: int = model.config.hidden_size
        self._takes_embeddings = model.config.model_type in EMBEDDINGS_PASSED_ON
        self.width = self._hidden_size * (1 + self._takes_embeddings)  # of what stages pass on of a token
        if not self._is_first:
            layers[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        if self._takes_embeddings:
            for number, layer in enumerate(layers, first_layer):
                layer.register_forward_pre_hook(partial(self._number, number))
        if not self._is_last:
            layers[-1].register_forward_hook(self._leave)

    def __call__(self, inputs: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Runs one sequence and returns hidden states. inputs: token ids [length] at the first stage.

        At other stages, inputs are hidden states [length, width].
        """
        self._given = embeddings = inputs[None]
        if self._takes_embeddings and not self._is_first:
            self._given, embeddings = torch.split(embeddings, self._hidden_size, dim=-1)
        name = "input_ids" if self._is_first else "inputs_embeds"
        # A copy, because some models scale embeddings in place.
        output = self.base(**{name: embeddings.clone()}, **arguments)
        result: torch.Tensor = (output.last_hidden_state if self._is_last else self._left)[0]
        return torch.cat((result, self._embeddings[0]), -1) if self._takes_embeddings and not self._is_last else result

    def _enter(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((self._given, *args[1:]), named) if args else (args, {**named, "hidden_states": self._given})

    def _number(self, number: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A hook that tells a layer its number in the whole model, with which the layer finds its cache.

        Also keeps the embeddings that the layer gets.
        """
        self._embeddings = args[1]
        return (*args[:2], number, *args[3:])

    def _leave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._left = output if isinstance(output, torch.Tensor) else output[0]


class _OwnLayers(nn.ModuleList):
    """The list of a stage's layers. Layers keep their numbers in the whole model, which are in the names of tensors."""

    def __init__(self, layers: Iterable[nn.Module], first_layer: int) -> None:
        super().__init__()
        for number, layer in enumerate(layers, first_layer):
            self.add_module(str(number), layer)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


class _Absent(nn.Module):
    """Replaces a module of another stage. Only the shape of its output is used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.empty(0)  # initialized by some models, whether it is loaded or not

    def forward(self, *args: object, **named: object) -> torch.Tensor:
        given = (each for each in (*args, *named.values()) if isinstance(each, torch.Tensor) and each.ndim > 2)
        return next(given, torch.zeros(()))


def load(
    model_class: type[PreTrainedModel],
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    first_layer: int,
    last_layer: int,
) -> PreTrainedModel:
    """Loads a model of which only layers [first_layer, last_layer) remain, with embedding or head if they belong to these.

    config: transformers' config of the whole model. tensors: by checkpoint name; those of other stages are ignored. Raises
    MissingTensors if names or shapes are not those of the config, and ArchitectureUnsupported if the class has no list with as
    many layers as the config says.
    """
    num_layers: int = getattr(config, layers_key(config.model_type))
    is_first, is_last = first_layer == 0, last_layer == num_layers
    config = copy.deepcopy(config)
    own = {}
    for name, tensor in tensors.items():
        match part_of(name):
            case int(number):
                is_own = first_layer <= number < last_layer
            case "embedding":
                is_own = is_first
            case "head":
                is_own = is_last
            case _:
                is_own = True
        if is_own:
            own[name] = tensor
    if getattr(config, "tie_word_embeddings", False) and not (is_first and is_last):
        config.tie_word_embeddings = False
        if is_last:
            head, embedding = _tied_matrices(model_class, config)
            own.setdefault(head, next(tensor for name, tensor in tensors.items() if embedding.endswith(name)))
    logging.disable_progress_bar()
    model, found = _sliced(model_class, first_layer, last_layer).from_pretrained(
        None,
        config=config,
        state_dict=own,
        dtype=dtype,
        attn_implementation=attention_of(config),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    for name, seen, expected in sorted(found["mismatched_keys"]):
        raise MissingTensors(f"{config.model_type}: {name} is {list(seen)}, and the config makes it {list(expected)}")
    for trouble in ("missing_keys", "unexpected_keys"):
        if found[trouble]:
            raise MissingTensors(f"{config.model_type}: {trouble.replace('_keys', '')} tensors: {sorted(found[trouble])[:8]}")
    _share(model)
    return model


def _share(model: PreTrainedModel) -> None:
    """Makes layers with equal shared blocks use one module. Before, each layer has its own copy of the block."""
    (layers,) = (module for module in model.modules() if isinstance(module, _OwnLayers))
    for name in ("shared_transf", "shared_transformer"):
        blocks: list[nn.Module] = []
        for layer in layers:
            if (own := getattr(layer, name, None)) is not None:
                same = next((block for block in blocks if _equal(block, own)), own)
                setattr(layer, name, same)
                blocks.append(same)


def _equal(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def _tied_matrices(model_class: type[PreTrainedModel], config: Any) -> tuple[str, str]:
    """Returns the names of the head's and the embedding's matrix in a model that shares one matrix for both."""
    with torch.device("meta"):
        whole = model_class(config)
    names = {module: name for name, module in whole.named_modules()}
    return f"{names[whole.get_output_embeddings()]}.weight", f"{names[whole.get_input_embeddings()]}.weight"


def cache_argument(model: nn.Module) -> str:
    """Returns the name of the cache's parameter of a model's `forward`. transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def attention_of(config: Any) -> str | None:
    """Returns the implementation of attention that a config needs. None if transformers may choose."""
    # SDPA has no soft cap on attention scores, and would silently drop it.
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None


def _sliced(model_class: type[PreTrainedModel], first_layer: int, last_layer: int) -> type[PreTrainedModel]:
    """Returns a subclass of the model class without the modules of other stages, so that they take no memory."""

    def __init__(self: PreTrainedModel, config: Any) -> None:
        model_class.__init__(self, config)
        num_layers = getattr(config, layers_key(config.model_type))
        lists = (
            (owner, name, child)
            for owner in self.modules()
            for name, child in owner.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == num_layers
        )
        owner, name, layers = next(lists, (None, "", ()))
        if owner is None:
            raise ArchitectureUnsupported(f"{config.model_type}: {model_class.__name__} has no list of {num_layers} layers")
        setattr(owner, name, _OwnLayers(list(layers)[first_layer:last_layer], first_layer))
        owner.config = _cut(config, first_layer, last_layer)
        before = EMBEDDING_MODULES if first_layer > 0 else frozenset()
        after = HEAD_MODULES if last_layer < num_layers else frozenset()
        _take_away(self, before | after)
        for module in self.modules():
            if type(module) is nn.Embedding:  # Youtu's class sets the padding token's row to 0, even if it was loaded
                module._is_hf_initialized = True  # type: ignore[assignment]
        # Layers that share weights with others have copies of their own.
        self.all_tied_weights_keys = {
            name: other for name, other in self.all_tied_weights_keys.items() if not isinstance(part_of(name), int)
        }

    # transformers finds a family's checkpoint conversion by the name of the class.
    return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})


def _take_away(module: nn.Module, names: frozenset[str]) -> None:
    """Replaces submodules whose names are in `names` if they have parameters. Does not look into layers."""
    for name, child in list(module.named_children()):
        if isinstance(child, _OwnLayers):
            continue
        has_layers = any(isinstance(inner, _OwnLayers) for inner in child.modules())
        if name in names and not has_layers and any(True for _ in child.parameters()):
            setattr(module, name, _Absent())
        elif name not in EMBEDDING_MODULES:  # which may have a norm
            _take_away(child, names)


def _cut(config: Any, first_layer: int, last_layer: int) -> Any:
    """Returns a copy of the config that describes only layers [first_layer, last_layer).

    It is for the module that calls the layers one after the other.
    """
    key = layers_key(config.model_type)
    cut, num_layers = copy.copy(config), getattr(config, key)
    setattr(cut, key, last_layer - first_layer)
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == num_layers:
            setattr(cut, name, value[first_layer:last_layer])
    kinds = config.attribute_map.get("layer_types", "layer_types")
    if isinstance(getattr(type(config), kinds, None), property):  # computed from the layers' numbers
        types = getattr(config, kinds)[first_layer:last_layer]
        cut.__class__ = type(type(config).__name__, (type(config),), {kinds: types})
    return cut
