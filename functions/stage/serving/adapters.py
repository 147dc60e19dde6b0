"""Reads an adapter's share of a stage's layers from the store."""

from collections.abc import Callable, Mapping
from contextlib import closing

from functions.configuration.config import StageConfig
from storage.errors import AdapterInvalid
from storage.loading.weight_loader import RawTensor, iterate_objects
from storage.models.adapters import read_version
from storage.models.model_repository import layer_object
from storage.store.object_reader import ObjectReader


def adapter_loader(config: StageConfig) -> Callable[[bytes], Mapping[str, RawTensor]]:
    """A function that reads the version of an adapter by its digest. It raises a StorageError."""

    def load(adapter: bytes) -> Mapping[str, RawTensor]:
        with closing(ObjectReader(config.store)) as reader:
            manifest = read_version(reader, config.model, adapter.hex())
            if manifest.rank > config.adapter_rank:
                raise AdapterInvalid(
                    f"its rank is {manifest.rank} and this stage takes ranks up to {config.adapter_rank}: raise `adapter_rank`"
                )
            names = [layer_object(layer) for layer in range(*config.layers)]
            stored = {name: manifest.objects[name] for name in names if name in manifest.objects}
            return {name: tensor for loaded in iterate_objects(reader, stored) for name, tensor in loaded.tensors.items()}

    return load
