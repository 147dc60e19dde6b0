"""Describes what follows the last layer of a model that makes vectors or scores of texts.

The config.json of the published model contains the description.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from storage.checkpoints.decoder import EMBEDDER_KEY

Pooled = Literal["mean", "last"]
Activation = Literal["identity", "tanh"]

CLASSIFIER: Final = "score.weight"


class Dense(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear layer after pooling.

    Its tensors are `{name}.linear.weight` [outs, ins] and, optionally, `{name}.linear.bias`.
    """

    name: str
    ins: int
    outs: int
    activation: Activation = "identity"


class Embedder(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Says how a model without a token head makes a vector or a score from the final hidden states of a text."""

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
        """Whether a text must be computed in one chunk, because its vector does not follow from those of its parts."""
        return self.bidirectional or (self.pooling == "mean" and bool(self.dense))

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the tensors that are used after pooling. A dense layer may lack its bias."""
        names = {f"{dense.name}.linear.{part}" for dense in self.dense for part in ("weight", "bias")}
        return frozenset(names | {CLASSIFIER} if self.classifies else names)


def embedder_in(config: Mapping[str, Any]) -> Embedder | None:
    """Reads the description of an embedder from a published model's config.json. None if the model generates tokens."""
    described = config.get(EMBEDDER_KEY)
    return None if described is None else msgspec.convert(described, Embedder)
