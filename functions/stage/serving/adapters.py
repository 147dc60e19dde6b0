"""Reads the part of an adapter for a stage's layers from the store."""

from collections.abc import Callable, Mapping

from functions.configuration.config import StageConfig
from storage.checkpoints.families import part_of
from storage.errors import AdapterInvalid
from storage.loading.weight_loader import RawTensor, iterate_objects
from storage.models.adapters import read_version
from storage.store.object_reader import ObjectReader


def adapter_loader(config: StageConfig) -> Callable[[bytes], Mapping[str, RawTensor]]:
    """Returns a function that takes the digest of an adapter's version and reads its tensors for this stage.

    That function raises a StorageError.
    """
    layers = range(*config.layers)

    def load(adapter: bytes) -> Mapping[str, RawTensor]:
        with ObjectReader(config.store) as reader:
            manifest = read_version(reader, config.model, adapter.hex())
            if manifest.rank > config.adapter_rank:
                raise AdapterInvalid(
                    f"its rank is {manifest.rank} and this stage takes ranks up to {config.adapter_rank}: raise `adapter_rank`"
                )
            wanted = {
                name: {tensor for tensor in stored.tensors if part_of(tensor) in layers}
                for name, stored in manifest.objects.items()
            }
            found = iterate_objects(reader, {name: manifest.objects[name] for name, tensors in wanted.items() if tensors})
            return {tensor: loaded.tensors[tensor] for loaded in found for tensor in wanted[loaded.name]}

    return load
