"""The address and credentials of an S3-compatible store: a plain value that its callers build from the environment."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSettings:
    """Address and credentials of one bucket. `repr` hides the secrets. Raises ValueError for an invalid endpoint or bucket."""

    endpoint_url: str  # http://host:port or https://host, without bucket: requests are in path style
    bucket: str
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    web_identity_token_file: str | None = None  # instead of keys: a token to exchange for keys (web_identity.py)
    role_arn: str | None = None  # the role whose keys the token is exchanged for
    sts_endpoint: str | None = None  # URL of the token service; None: Amazon's in `region`
    region: str = "us-east-1"

    def __post_init__(self) -> None:
        parts = urlsplit(self.endpoint_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"store endpoint {self.endpoint_url!r} is no URL such as http://127.0.0.1:9000 or https://s3.example.com"
            )
        if parts.query or parts.fragment or parts.username:
            raise ValueError(f"store endpoint {parts.hostname!r} may have a host, a port and a path, nothing else")
        if not self.bucket or "/" in self.bucket:
            raise ValueError(f"store bucket {self.bucket!r} is no bucket name")

    @property
    def place(self) -> str:
        """Names endpoint and bucket, for messages."""
        return f"bucket {self.bucket!r} at {self.endpoint_url}"
