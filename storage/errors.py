"""Errors of stores, published models and checkpoints: one class per condition.

Every message names what was seen (endpoint, bucket, key, file) and what to do about it.
"""


class StorageError(Exception):
    """Base of all errors that this package raises on purpose."""


class StoreUnreachable(StorageError):
    """The endpoint does not answer, or it still stalled or failed when the time for retries was over. Trying later may help."""


class AccessDenied(StorageError):
    """The store refuses the access keys, or does not allow the request with them. A retry does not help."""


class BucketNotFound(StorageError):
    """The endpoint has no such bucket. A retry does not help."""


class ObjectNotFound(StorageError):
    """The bucket has no such object. A retry does not help."""


class UnexpectedAnswer(StorageError):
    """The endpoint sent an answer that no S3 store would send. A retry does not help."""


class ObjectAltered(StorageError):
    """An object in the store differs in length or contents from what was written. Publish an altered model again."""


class ChecksumMismatch(ObjectAltered):
    """A part or a file of a published model does not have the checksum that the manifest states.

    Parts of weights are read several times before this is raised. The object was altered: publish the model again.
    """


class SealBroken(ObjectAltered):
    """An encrypted KV object was altered or truncated, or encrypted with another key. The caller computes its KV again."""


class ModelNotPublished(StorageError):
    """The store holds no manifest for this name and dtype. Publish the model first."""


class ManifestInvalid(StorageError):
    """A manifest cannot be read, or contradicts itself. Publish the model again."""


class ManifestTooNew(ManifestInvalid):
    """A manifest has a later version than this Lamina can read. Update Lamina, or publish again with this one."""


class ManifestTooOld(ManifestInvalid):
    """A manifest has an old version, whose checksums can be forged. Publish the model again, and render its pipelines again."""


class CheckpointInvalid(StorageError):
    """A checkpoint is incomplete, truncated or in a format that cannot be published. Nothing was published."""


class AdapterInvalid(CheckpointInvalid):
    """An adapter does not fit its model, or needs an operation that no stage computes. Nothing was published."""


class AdapterNotPublished(StorageError):
    """The store holds no adapter of this name, or not the wanted version. Publish it first."""


class ArchitectureUnsupported(CheckpointInvalid):
    """A checkpoint holds a model of a kind that Lamina cannot run, such as an encoder or an unknown family."""


class LibraryMissing(StorageError):
    """The operation needs a library that a lean installation leaves out. Install requirements.txt."""

    def __init__(self, what: str, missing: ImportError) -> None:
        super().__init__(
            f"{what}, which is not installed here ({missing}): pip install -r requirements.txt, or the image's target `full`"
        )
