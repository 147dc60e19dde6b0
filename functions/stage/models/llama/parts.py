"""Which parts of a Llama-shaped model a group has, and what of them is still missing; what a pass must be like."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from functions.stage.models.layer_group import KVCache, MissingTensors, Segment
from storage.checkpoints.llama_config import LlamaConfig


@dataclass(frozen=True, slots=True)
class Parts:
    """Layers [first, last), with the embedding ahead of the first, and norm and head behind the last."""

    model: LlamaConfig
    first: int
    last: int

    def __post_init__(self) -> None:
        """Raises ValueError for a group that the model does not have."""
        if not 0 <= self.first < self.last <= self.model.num_layers:
            raise ValueError(f"layers {self.first}:{self.last} are no group of a model of {self.model.num_layers}")

    @property
    def is_first(self) -> bool:
        return self.first == 0

    @property
    def is_last(self) -> bool:
        return self.last == self.model.num_layers

    @property
    def has_embedding(self) -> bool:
        """As embedding, or as the head that it is tied to."""
        return self.is_first or (self.is_last and self.model.tie_word_embeddings)

    def check_placed(self, layers: Collection[int], *, embedding: bool, norm: bool, head: bool) -> None:
        """Raises MissingTensors, naming what has not been placed."""
        missing = [f"model.layers.{layer}" for layer in range(self.first, self.last) if layer not in layers]
        if self.is_first and not embedding:
            missing.append("model.embed_tokens.weight")
        if self.is_last and not norm:
            missing.append("model.norm.weight")
        if self.is_last and not head:
            missing.append("model.embed_tokens.weight" if self.model.tie_word_embeddings else "lm_head.weight")
        if missing:
            raise MissingTensors(f"not placed: {', '.join(missing)}")


def check_segments(kv: KVCache, rows: int, segments: Sequence[Segment]) -> None:
    """Raises ValueError for segments that are not all of `rows`, or do not follow what their sequences hold."""
    handles = {segment.handle for segment in segments}
    if not segments or len(handles) < len(segments):
        raise ValueError(f"{len(segments)} segments of {len(handles)} sequences: one for each, and at least one")
    wanted = sum(segment.length for segment in segments)
    if rows != wanted:
        raise ValueError(f"{rows} rows of input for segments of {wanted} tokens in all")
    for segment in segments:
        held, reserved = kv.length(segment.handle), kv.reserved(segment.handle)
        if segment.length < 1 or held != segment.position or held + segment.length > reserved:
            raise ValueError(f"{segment} does not follow the {held} tokens held, of {reserved} reserved")


def positions_of(segments: Sequence[Segment]) -> list[int]:
    """Of all tokens of a pass."""
    return [segment.position + token for segment in segments for token in range(segment.length)]
