"""AWS signature version 4 for requests about an object or a bucket, with the standard library alone.

botocore can do this too, but importing its signer costs a starting pod 0.1 s and 30 modules; this is held to botocore's
answer by a test. See "Signature Version 4 signing process" in the Amazon S3 API reference.
"""

import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote, urlsplit

from storage.store.settings import StoreSettings

EMPTY_BODY_SHA256: Final = hashlib.sha256(b"").hexdigest()
_ALGORITHM: Final = "AWS4-HMAC-SHA256"


def object_path(settings: StoreSettings, key: str) -> str:
    """The path of a path-style request, percent-encoded once, as S3 signs it."""
    base = urlsplit(settings.endpoint_url).path.rstrip("/")
    return quote(f"{base}/{settings.bucket}/{key}", safe="/-_.~")


def canonical_query(parameters: Mapping[str, str]) -> str:
    """In the order and encoding that S3 signs, which is also what is sent."""
    return "&".join(f"{quote(name, safe='-_.~')}={quote(parameters[name], safe='-_.~')}" for name in sorted(parameters))


def signed_get_headers(settings: StoreSettings, path: str, now: datetime | None = None) -> dict[str, str]:
    """Headers that make `GET path` a signed request; others, such as Range, may be added unsigned."""
    return signed_headers(settings, "GET", path, EMPTY_BODY_SHA256, now)


def signed_headers(
    settings: StoreSettings,
    method: str,
    path: str,
    body_sha256: str = EMPTY_BODY_SHA256,
    now: datetime | None = None,
    query: str = "",
) -> dict[str, str]:
    """Headers that make `method path?query` with a body of this SHA-256 (hexadecimal) a signed request.

    query: as `canonical_query` writes it. `now` is aware, in UTC. Includes Host, so that what was signed is what is sent.
    """
    timestamp = (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
    headers = {
        "host": _host(settings.endpoint_url),
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
    signature = hmac.new(_signing_key(settings, timestamp[:8]), to_sign.encode(), hashlib.sha256).hexdigest()
    credential = f"{settings.access_key_id}/{scope}"
    headers["authorization"] = f"{_ALGORITHM} Credential={credential}, SignedHeaders={names}, Signature={signature}"
    return headers


def _signing_key(settings: StoreSettings, date: str) -> bytes:
    key = f"AWS4{settings.secret_access_key}".encode()
    for scope in (date, settings.region, "s3", "aws4_request"):
        key = hmac.new(key, scope.encode(), hashlib.sha256).digest()
    return key


def _host(endpoint_url: str) -> str:
    # The default port is left out of the Host header (RFC 9110 section 4.2.3), and so out of the signature.
    parts = urlsplit(endpoint_url)
    default = 443 if parts.scheme == "https" else 80
    name = parts.netloc.rpartition("@")[2]
    return name.removesuffix(f":{default}")
