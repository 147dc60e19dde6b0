"""Adapters (LoRA) in a bucket, published from PEFT folders. Each object has the tensors of a few layers.

    adapters/{model}/versions/{version}/manifest.json, from-00000.safetensors …
    adapters/{model}/names/{name}.json

A version is named by its contents and never changes. A name lists versions with the share of requests that each gets. A push
writes a version first and its name last. Sequences that run keep the version with which they began.
"""

from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import msgspec

from storage.errors import AdapterNotPublished, ManifestInvalid, ObjectNotFound
from storage.models.model_repository import Reader, StoredObject, check_name, contradiction

if TYPE_CHECKING:
    from storage.store.object_store import ObjectStore
    from storage.store.payload_store import PayloadStore

MAX_RANK: Final = 256
VERSION_DIGITS: Final = 32
ADAPTERS: Final = "adapters/"
MANIFEST: Final = "manifest.json"

Version = Annotated[str, msgspec.Meta(pattern=f"^[0-9a-f]{{{VERSION_DIGITS}}}$")]
T = TypeVar("T")


class AdapterManifest(msgspec.Struct, frozen=True, kw_only=True):
    """One version of an adapter.

    An object has three tensors for each adapted module X of its layers: `X.lora_A` [rank, inputs], `X.lora_B` [outputs, rank]
    and `X.lora_scale`, a float32. The module's output for the input x grows by scale * B A x.
    """

    rank: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)]  # the largest
    modules: tuple[str, ...]  # without the layers' prefix, sorted
    objects: dict[str, StoredObject]  # each has whole layers; their tensors' names say which

    @property
    def bytes(self) -> int:
        return sum(stored.bytes for stored in self.objects.values())


class NamedVersion(msgspec.Struct, frozen=True):
    version: Version
    share: Annotated[int, msgspec.Meta(ge=0, le=100)]  # percent of the requests for the name
    rank: int
    bytes: int


class AdapterName(msgspec.Struct, frozen=True):
    """The versions of an adapter's name, the newest last. Their shares add up to 100."""

    versions: Annotated[tuple[NamedVersion, ...], msgspec.Meta(min_length=1)]

    def version_at(self, point: float) -> str:
        """Chooses the version for a request by the shares. point: a number in [0, 1), drawn once for each request."""
        end = 0
        for each in self.versions:
            end += each.share
            if 100 * point < end:
                return each.version
        return self.versions[-1].version


def adapter_prefix(model: str) -> str:
    """The prefix of the keys of all adapters of a model. Raises ValueError for an invalid name."""
    check_name(model)
    return f"{ADAPTERS}{model}/"


def list_adapters(store: "ObjectStore | PayloadStore", model: str) -> list[str]:
    """The names of a model's adapters, sorted."""
    prefix = f"{adapter_prefix(model)}names/"
    return sorted(item.key.removeprefix(prefix).removesuffix(".json") for item in store.list(prefix))


def read_name(reader: Reader, model: str, name: str) -> AdapterName:
    """Reads the versions of an adapter's name. Raises AdapterNotPublished, ManifestInvalid, or the reader's errors."""
    key = f"{adapter_prefix(model)}names/{name}.json"
    return _decoded(reader, key, AdapterName, f"adapter {name!r} of model {model!r} is not published")


def read_version(reader: Reader, model: str, version: str) -> AdapterManifest:
    """Reads the manifest of a version. Raises AdapterNotPublished, ManifestInvalid, or the reader's errors."""
    key = f"{version_prefix(model, version)}{MANIFEST}"
    manifest = _decoded(reader, key, AdapterManifest, f"version {version} of an adapter of model {model!r} is not published")
    for name, stored in manifest.objects.items():
        if reason := contradiction(stored):
            raise ManifestInvalid(f"{key}: object {name!r} {reason}; publish the adapter again")
    return manifest


def _decoded(reader: Reader, key: str, type_: type[T], missing: str) -> T:
    try:
        return msgspec.json.decode(reader.get(key), type=type_)
    except ObjectNotFound as error:
        raise AdapterNotPublished(f"{missing}: {error}; publish it with push-adapter") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestInvalid(f"{key} cannot be read ({error}); publish the adapter again") from error


def version_prefix(model: str, version: str) -> str:
    return f"{adapter_prefix(model)}versions/{version}/"
