"""The publication that a function was made for: found in the store, and held against its configuration."""

from eventing.wire.events import pipeline_fingerprint
from functions.configuration.config import CommonConfig
from storage.models.model_repository import ModelManifest, Reader, read_manifest


class WrongPublication(Exception):
    """The store holds another model than this function was made for. Render the pipeline again."""


def read_publication(config: CommonConfig, reader: Reader) -> ModelManifest:
    """The manifest. Raises WrongPublication naming what was found, or a StorageError."""
    manifest = read_manifest(reader, config.model, config.dtype)
    what = f"model {config.model!r} in {config.dtype} in {config.store.place}"
    if config.cut[-1][1] != manifest.num_layers:
        raise WrongPublication(
            f"{what} has {manifest.num_layers} layers and LAMINA_CUT ends at {config.cut[-1][1]}; render the pipeline again"
        )
    seen = pipeline_fingerprint(manifest.digest, config.cut, config.dtype)
    if seen != config.pipeline:
        raise WrongPublication(
            f"{what}, cut as LAMINA_CUT says, is pipeline {seen}, and LAMINA_PIPELINE says {config.pipeline}: "
            "it was published anew, or cut otherwise, or this is another version of Lamina; render the pipeline again"
        )
    return manifest
