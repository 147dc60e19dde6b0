"""Errors of stores, publications and checkpoints: one class per condition.

Every message names what was seen (endpoint, bucket, key, file) and what to do about it.
"""


class StorageError(Exception):
    """Base of all errors that this package raises on purpose."""


class StoreUnreachable(StorageError):
    """The endpoint does not answer, or it stalls or fails for longer than the retries last. Trying later may help."""


class AccessDenied(StorageError):
    """The store refuses the access keys or what they ask for. A retry does not help."""


class BucketNotFound(StorageError):
    """The endpoint answers and has no such bucket. A retry does not help."""


class ObjectNotFound(StorageError):
    """The bucket has no such object. A retry does not help."""


class UnexpectedAnswer(StorageError):
    """The endpoint gives an answer that an S3 store would not give. A retry does not help."""


class ObjectAltered(StorageError):
    """An object in the store has another length or other contents than were written. Publish an altered model again."""


class ChecksumMismatch(ObjectAltered):
    """The bytes read for a part or a file of a publication have another checksum than its manifest says.

    Parts of weights are read several times before this is raised. The object was altered: publish again.
    """


class SealBroken(ObjectAltered):
    """An encrypted KV object was altered or truncated, or encrypted with another key. Its KV is computed again."""


class ModelNotPublished(StorageError):
    """The store holds no manifest for this name and dtype. Publish the model first."""


class ManifestInvalid(StorageError):
    """A manifest cannot be read, or contradicts itself. Publish again."""


class ManifestTooNew(ManifestInvalid):
    """A manifest has a later version than this Lamina reads. Update Lamina, or publish again with this one."""


class ManifestTooOld(ManifestInvalid):
    """A manifest has an old version, whose checksums can be forged. Publish the model again, and render its pipelines again."""


class CheckpointInvalid(StorageError):
    """A checkpoint is incomplete, truncated or in a format that cannot be published. Nothing was published."""


class AdapterInvalid(CheckpointInvalid):
    """An adapter does not fit its model, or has what no stage computes. Nothing was published."""


class AdapterNotPublished(StorageError):
    """The store holds no adapter of this name, or no such version. Publish it first."""


class ArchitectureUnsupported(CheckpointInvalid):
    """A checkpoint holds a model of a kind that Lamina cannot run, such as an encoder or an unknown family."""


class LibraryMissing(StorageError):
    """What was asked for needs a library that a lean installation leaves out. Install requirements.txt."""

    def __init__(self, what: str, missing: ImportError) -> None:
        super().__init__(
            f"{what}, which is not installed here ({missing}): pip install -r requirements.txt, or the image's target `full`"
        )
