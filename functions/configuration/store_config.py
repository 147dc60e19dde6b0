"""Where models lie, and conversations that no pod holds, as the environment says it."""

from dataclasses import dataclass

from functions.configuration import parsers
from functions.configuration.settings import setting
from storage.store.settings import StoreSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig(StoreSettings):
    """Where models lie: an S3-compatible store."""

    endpoint_url: str = setting("LAMINA_STORE_ENDPOINT", parsers.url, "URL of the S3-compatible store")
    bucket: str = setting("LAMINA_STORE_BUCKET", parsers.text, "bucket that holds the models")
    region: str = setting("LAMINA_STORE_REGION", parsers.text, "region that requests are signed for", "us-east-1")
    access_key_id: str | None = setting("AWS_ACCESS_KEY_ID", parsers.text, "access key of the store", "")
    secret_access_key: str | None = setting("AWS_SECRET_ACCESS_KEY", parsers.text, "secret key of the store", "", secret=True)
    session_token: str | None = setting("AWS_SESSION_TOKEN", parsers.text, "token of temporary keys", "", secret=True)
    web_identity_token_file: str | None = setting(
        "AWS_WEB_IDENTITY_TOKEN_FILE", parsers.text, "instead of keys: file with a token that is exchanged for some", ""
    )
    role_arn: str | None = setting("AWS_ROLE_ARN", parsers.text, "role that the token is to become", "")
    sts_endpoint: str | None = setting(
        "AWS_ENDPOINT_URL_STS", parsers.url, "URL of who exchanges it; unset: AWS's own of LAMINA_STORE_REGION", ""
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class KVStoreConfig:
    """Where conversations may lie that no pod holds any more."""

    place: tuple[str, str] | None = setting(
        "LAMINA_KV_STORE",
        parsers.bucket_and_prefix,
        "BUCKET/PREFIX where keys and values of idle conversations are kept when their pod ends; unset: nowhere",
        "",
    )
    endpoint_url: str | None = setting(
        "LAMINA_KV_STORE_ENDPOINT", parsers.url, "URL of that store; unset: LAMINA_STORE_ENDPOINT", ""
    )
    access_key_id: str | None = setting(
        "LAMINA_KV_STORE_ACCESS_KEY_ID", parsers.text, "access key that may write there; unset: as for models", ""
    )
    secret_access_key: str | None = setting(
        "LAMINA_KV_STORE_SECRET_ACCESS_KEY", parsers.text, "its secret key", "", secret=True
    )
    key: bytes | None = setting(
        "LAMINA_KV_KEY", parsers.key_256, "what is kept there is encrypted with: 64 hexadecimal digits", "", secret=True
    )
    max_bytes: int = setting(
        "LAMINA_KV_STORE_BYTES", parsers.integer(1), "most bytes of this stage there; the oldest go", str(10 * 2**30)
    )
    max_age_seconds: float = setting(
        "LAMINA_KV_STORE_AGE_SECONDS", parsers.seconds, "what was written longer ago goes", str(7 * 86_400)
    )
    bytes_per_second: int = setting(
        "LAMINA_KV_STORE_BYTES_PER_SECOND", parsers.integer(1), "how fast a pod writes at most", str(64 * 2**20)
    )
