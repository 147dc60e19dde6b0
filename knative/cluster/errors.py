"""Errors of a cluster, one class per condition, and the choice of the class for an API server's reply."""

import json
from typing import Final

_EXCERPT_LENGTH: Final = 200  # characters shown of a reply that is no Kubernetes Status, such as a proxy's page


class ClusterError(Exception):
    """Base class of a cluster's errors. The message says what was seen and what to do."""


class ClusterUnreachable(ClusterError):
    """There is no kubeconfig, no such context in it, or no reply from the API. A retry helps once that is fixed."""


class NotPermitted(ClusterError):
    """The API itself answered 401 or 403, not an admission webhook. An administrator must grant the right."""


class KindMissing(ClusterError):
    """The API does not serve this kind: its CRD is not installed."""


class Rejected(ClusterError):
    """The API or an admission webhook rejects the request, or the pipeline's state does not allow it. A retry does not help."""


class FieldConflict(ClusterError):
    """Another field manager has set fields that we want to set. Applying with force takes them over."""


class PreflightFailed(ClusterError):
    """The cluster lacks something that the deployment needs. The message says what, and how to get it."""


class DeployFailed(ClusterError):
    """An object did not become Ready. The message has the reason and a diagnosis."""


class DeployInProgress(ClusterError):
    """Another deployment of this pipeline runs, or has taken over the Lease. A retry helps when that deployment has ended."""


class NothingServes(ClusterError):
    """There is no version to go back to, or no canary to promote. A retry does not help."""


def cluster_error(doing: str, status: int, body: bytes | str | None, reason: str) -> ClusterError:
    """The error for an HTTP reply with an error status.

    doing: the request in words, such as "reading Service default/chat". reason: used if the body holds no message.
    """
    text = body.decode(errors="replace") if isinstance(body, bytes) else body or ""
    try:
        message = str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        message = " ".join(text.split())[:_EXCERPT_LENGTH] or reason
    if status == 401:
        return NotPermitted(f"{doing}: unknown identity: {message}; log in again, or choose another context")
    if status == 403 and "because it is being terminated" in message:
        return Rejected(f"{doing}: {message}; wait until the namespace is gone, then create it again")
    if status == 403 and "admission webhook" not in message and "exceeded quota" not in message:
        return NotPermitted(f"{doing}: {message}; ask for a Role with this right in the namespace")
    if status == 409 and "conflict" in message.lower():
        return FieldConflict(f"{doing}: {message}; undo those changes, or take the fields over with --force-conflicts")
    if status == 404:
        return Rejected(f"{doing}: {message}; does the namespace exist?")
    if "exceeded quota" in message:
        return Rejected(f"{doing}: {message}; lower the resources in the spec, or have the quota raised")
    return Rejected(f"{doing}: the cluster answered {status}: {message}")
