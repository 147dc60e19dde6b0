"""What follows the last layer of a model that makes vectors or scores of texts, as its publication's config.json says it."""

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from storage.checkpoints.decoder import EMBEDDER_KEY

Pooled = Literal["mean", "last"]
Activation = Literal["identity", "tanh"]

CLASSIFIER: Final = "score.weight"


class Dense(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear layer after pooling. Its tensors are `{name}.linear.weight` [outs, ins] and, if it has any, `.bias`."""

    name: str
    ins: int
    outs: int
    activation: Activation = "identity"


class Embedder(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How a model without a head for tokens makes a vector, or scores, of a text's final hidden states."""

    pooling: Pooled
    size: int  # of a vector
    normalized: bool = True
    bidirectional: bool = False  # tokens attend to later ones, so a text is computed in one chunk
    dense: tuple[Dense, ...] = ()
    classifies: bool = False  # its vector is one logit, by the matrix CLASSIFIER
    max_tokens: int | None = None  # of a text; None: the model's context
    # Shorter lengths that a vector may be cut to; empty: none; None: any.
    dimensions: tuple[int, ...] | None = ()

    @property
    def in_one_chunk(self) -> bool:
        """Whether a text is computed in one chunk: vectors of its parts do not make the vector of the whole."""
        return self.bidirectional or (self.pooling == "mean" and bool(self.dense))

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the tensors that follow pooling; a dense layer may lack its bias."""
        names = {f"{dense.name}.linear.{part}" for dense in self.dense for part in ("weight", "bias")}
        return frozenset(names | {CLASSIFIER} if self.classifies else names)


def embedder_in(config: Mapping[str, Any]) -> Embedder | None:
    """What the config.json of a publication says of an embedder; None: the model generates tokens."""
    described = config.get(EMBEDDER_KEY)
    return None if described is None else msgspec.convert(described, Embedder)
