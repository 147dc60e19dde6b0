"""How pods without keys of the store are known to it."""

from typing import Annotated

from msgspec import Meta, Struct


class WebIdentity(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token of the pods' ServiceAccounts, which a security token service takes for keys (AssumeRoleWithWebIdentity)."""

    audience: str = "sts.amazonaws.com"
    role_arn: str | None = None
    """Unset: the service knows by the token what it is good for, as MinIO does."""
    sts_endpoint: Annotated[str, Meta(pattern="^https?://")] | None = None
    """Unset: AWS's own of `region`."""
