"""What an API server answers when it refuses, as a ClusterError that says the cause and the next step."""

import json
from typing import Final

from knative.cluster.errors import ClusterError, FieldConflict, NotPermitted, Refused

_EXCERPT_LENGTH: Final = 200
"""Of what answers in no form that we know, such as a proxy's page."""


def cluster_error(doing: str, status: int, body: bytes | str | None, reason: str) -> ClusterError:
    """doing: what was asked, as a person would say it."""
    message = _message(body, reason)
    if status == 401:
        return NotPermitted(f"{doing}: unknown identity: {message}; log in again, or choose another context")
    if status == 403 and "because it is being terminated" in message:
        return Refused(f"{doing}: {message}; wait until it is gone, and make it again")
    if status == 403 and "admission webhook" not in message and "exceeded quota" not in message:
        return NotPermitted(f"{doing}: {message}; ask for a Role with this right in the namespace")
    if status == 409 and "conflict" in message.lower():
        return FieldConflict(f"{doing}: {message}; remove those changes, or take the fields over with --force-conflicts")
    if status == 404:
        return Refused(f"{doing}: {message}; does the namespace exist?")
    if "exceeded quota" in message:
        return Refused(f"{doing}: {message}; lower the resources in the spec, or have the quota raised")
    return Refused(f"{doing}: the cluster answered {status}: {message}")


def _message(body: bytes | str | None, reason: str) -> str:
    text = body.decode(errors="replace") if isinstance(body, bytes) else body or ""
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:_EXCERPT_LENGTH] or reason
