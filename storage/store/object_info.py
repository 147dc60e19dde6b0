"""An object as a store lists it; apart from `object_store`, so that naming it does not import boto3."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as listed or headed."""

    key: str
    bytes: int
