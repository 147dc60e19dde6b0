"""Whether a pod's memory holds what its stage is to keep in it (docs/scaling.md, "Memory of a stage")."""

from collections.abc import Sequence
from typing import Final

from knative.spec.errors import SpecError
from knative.spec.pipeline_spec import Stage, quantity

WEIGHTS_FACTOR: Final = 1.2
"""Layers are laid out for the processor one after the other, and one of them is there twice for a moment."""
OTHER_BYTES: Final = 2**30
"""Python, torch where it is, one pass."""


def needed_bytes(stage: Stage, weight_bytes: int | None) -> float:
    """weight_bytes: of the stage; None: not known, and left out."""
    loaded = 0 if stage.layer_group == "sleep" else weight_bytes or 0
    return loaded * WEIGHTS_FACTOR + quantity(stage.kv_cache) + OTHER_BYTES


def check_memory(stages: Sequence[Stage], weight_bytes: Sequence[int | None]) -> None:
    """Raises SpecError, with the sum, for the first stage whose pods would run out. On a GPU weights and keys lie in its
    memory, of which a spec says nothing."""
    for index, (stage, weights) in enumerate(zip(stages, weight_bytes, strict=True)):
        asked, needed = quantity(stage.resources.memory), needed_bytes(stage, weights)
        if asked < needed and not stage.resources.gpu:
            known = "weights (not known here)" if weights is None else f"weights of {_mib(weights)} × {WEIGHTS_FACTOR:g}"
            raise SpecError(
                f"$.stage.resources.memory: stage {index} has {stage.resources.memory} and needs {_mib(needed)}: {known}, "
                f"kv_cache {stage.kv_cache}, and {_mib(OTHER_BYTES)} besides; give it more, or a smaller kv_cache, or cut finer"
            )


def _mib(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"
