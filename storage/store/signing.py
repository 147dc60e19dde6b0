"""AWS signature version 4 for requests about an object or a bucket, with the standard library alone.

Importing botocore's signer costs a starting pod 0.1 s and 30 modules; a test compares both. See "Signature Version 4 signing
process" in the Amazon S3 API reference.
"""

import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote, urlsplit

from storage.store.settings import StoreSettings

_EMPTY_BODY_SHA256: Final = hashlib.sha256(b"").hexdigest()
_ALGORITHM: Final = "AWS4-HMAC-SHA256"


def object_path(settings: StoreSettings, key: str) -> str:
    """The URL path of a request for an object: bucket and key, percent-encoded once, as S3 signs it."""
    base = urlsplit(settings.endpoint_url).path.rstrip("/")
    return quote(f"{base}/{settings.bucket}/{key}", safe="/-_.~")


def canonical_query(parameters: Mapping[str, str]) -> str:
    """The query string in the order and encoding that S3 signs."""
    return "&".join(f"{quote(name, safe='-_.~')}={quote(parameters[name], safe='-_.~')}" for name in sorted(parameters))


def signed_headers(
    settings: StoreSettings,
    method: str,
    path: str,
    body_sha256: str = _EMPTY_BODY_SHA256,
    now: datetime | None = None,
    query: str = "",
) -> dict[str, str]:
    """The headers of a signed request for `path?query`, Host included. Others, such as Range, may be added unsigned.

    body_sha256: hexadecimal. query: as `canonical_query` writes it. now: a time in UTC, with its time zone; if it is None, the
    present time.
    """
    timestamp = (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
    endpoint = urlsplit(settings.endpoint_url)
    # The Host header leaves out the default port (RFC 9110 section 4.2.3), and so must the signature.
    default_port = 443 if endpoint.scheme == "https" else 80
    headers = {
        "host": endpoint.netloc.rpartition("@")[2].removesuffix(f":{default_port}"),
        "x-amz-content-sha256": body_sha256,
        "x-amz-date": timestamp,
    }
    if settings.session_token:
        headers["x-amz-security-token"] = settings.session_token
    names = ";".join(sorted(headers))
    canonical_headers = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    request = "\n".join((method, path, query, canonical_headers, names, body_sha256))
    scope = f"{timestamp[:8]}/{settings.region}/s3/aws4_request"
    to_sign = "\n".join((_ALGORITHM, timestamp, scope, hashlib.sha256(request.encode()).hexdigest()))
    signing_key = f"AWS4{settings.secret_access_key}".encode()
    for step in scope.split("/"):
        signing_key = hmac.new(signing_key, step.encode(), hashlib.sha256).digest()
    signature = hmac.new(signing_key, to_sign.encode(), hashlib.sha256).hexdigest()
    credential = f"{settings.access_key_id}/{scope}"
    headers["authorization"] = f"{_ALGORITHM} Credential={credential}, SignedHeaders={names}, Signature={signature}"
    return headers
