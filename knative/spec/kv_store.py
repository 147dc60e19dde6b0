"""Where a pipeline keeps idle conversations."""

from typing import Annotated, Final

from msgspec import Meta, Struct

KV_PREFIX: Final = "kv"


class KVStore(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where keys and values of idle conversations go when their pod ends, encrypted: they need not be computed again then."""

    secret: str
    """Secret whose key `key` (64 hexadecimal digits) they are encrypted with. Its AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY
    may read, write, list and delete below the prefix; without them, pods' own keys must."""
    bucket: str | None = None
    """Unset: the models'."""
    prefix: Annotated[str, Meta(pattern="^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$")] = KV_PREFIX
    endpoint: Annotated[str, Meta(pattern="^https?://")] | None = None
    """Unset: the models'."""
    max_bytes: str = "10Gi"
    """Of the whole pipeline, a quantity; the oldest go."""
    max_age_seconds: Annotated[float, Meta(gt=0, le=10_000_000)] | None = None
    """What was written longer ago goes. Unset: seven days."""
    write_rate: str | None = None
    """Bytes per second that a pod writes at most, a quantity. Unset: 64Mi."""
