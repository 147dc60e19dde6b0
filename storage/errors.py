"""What can go wrong with a store, a publication or a checkpoint: one class per condition.

Every message names what was seen (endpoint, bucket, key, file) and what to do about it.
"""


class StorageError(Exception):
    """Base of everything that this package raises on purpose."""


class StoreUnreachable(StorageError):
    """Nobody answers at the endpoint, or it stalls or fails for longer than the retries last. Trying later may help."""


class AccessDenied(StorageError):
    """The store refuses the keys. A retry does not help."""


class BucketNotFound(StorageError):
    """The endpoint answers and has no such bucket. A retry does not help."""


class ObjectNotFound(StorageError):
    """The bucket has no such object. A retry does not help."""


class UnexpectedAnswer(StorageError):
    """The endpoint answers something that an S3 store would not. A retry does not help."""


class ObjectAltered(StorageError):
    """An object is not the one that its manifest describes: other length, other content. Publish again."""


class ChecksumMismatch(ObjectAltered):
    """A part or a file arrives with another checksum than its manifest's, also when read again."""


class SealBroken(ObjectAltered):
    """A sealed object was altered or truncated, or another key sealed it. What it held is computed again."""


class ModelNotPublished(StorageError):
    """The store holds no manifest for this name and dtype."""


class ManifestInvalid(StorageError):
    """A manifest that cannot be read, or that contradicts itself. Publish again."""


class ManifestTooNew(ManifestInvalid):
    """A manifest of a later version than this one reads. Update Lamina, or publish again with this one."""


class ManifestTooOld(ManifestInvalid):
    """A manifest of a version whose checksums prove nothing. Publish the model again, and render its pipelines again."""


class CheckpointInvalid(StorageError):
    """A checkpoint that is incomplete, truncated or in a format that is not published. Nothing became visible."""


class ArchitectureUnsupported(CheckpointInvalid):
    """A checkpoint of a model that is not a decoder known here."""


class LibraryMissing(StorageError):
    """What is asked for takes a library that a lean installation leaves out. Install requirements.txt."""

    def __init__(self, what: str, missing: ImportError) -> None:
        super().__init__(
            f"{what}, which is not installed here ({missing}): pip install -r requirements.txt, or the image's target `full`"
        )
