"""Reads the manifest of a function's model from the store and checks it against the configuration."""

from eventing.wire.events import fingerprint_of
from functions.configuration.config import CommonConfig
from functions.configuration.parsers import LayerRange
from storage.models.model_repository import ModelManifest, Reader, read_manifest


class WrongPublication(Exception):
    """The store has another model than the configuration names. Render the pipeline again."""


def read_publication(config: CommonConfig, reader: Reader, group: LayerRange | None = None) -> ModelManifest:
    """Returns the manifest of the configured model.

    `group` is the layers of a stage, whose weights are checked. It is None for a gateway, which reads no weights. Raises
    WrongPublication, which names what was found, or a StorageError.
    """
    manifest = read_manifest(reader, config.model, config.dtype)
    what = f"model {config.model!r} in {config.dtype} in {config.store.place}"
    if config.cut[-1][1] != manifest.num_layers:
        raise WrongPublication(
            f"{what} has {manifest.num_layers} layers and LAMINA_CUT ends at {config.cut[-1][1]}; render the pipeline again"
        )
    own = (config.dtype, manifest.digest)
    weights = config.weights or (own,) * len(config.cut)
    if len(weights) != len(config.cut):
        raise WrongPublication(f"LAMINA_WEIGHTS names {len(weights)} groups and LAMINA_CUT has {len(config.cut)}; render again")
    if group is not None and weights[config.cut.index(group)] != own:
        dtype, digest = weights[config.cut.index(group)]
        raise WrongPublication(
            f"{what} has the digest {manifest.digest}, and LAMINA_WEIGHTS wants {digest} in {dtype} for layers {group[0]} to "
            f"{group[1] - 1}: it was published anew; render the pipeline again"
        )
    seen = fingerprint_of(weights, config.cut, config.wire_dtype, config.kv_dtype)
    if seen != config.pipeline:
        raise WrongPublication(
            f"{what}, cut as LAMINA_CUT says, is pipeline {seen}, and LAMINA_PIPELINE says {config.pipeline}: "
            "it was published anew, or cut otherwise, or this is another version of Lamina; render the pipeline again"
        )
    return manifest
