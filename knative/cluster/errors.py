"""What can go wrong with a cluster, apart from the client that finds out; one class per condition."""


class ClusterError(Exception):
    """Base. The message says what was seen and what to do."""


class ClusterUnreachable(ClusterError):
    """No kubeconfig, no such context, or nobody answers. A retry helps once that is mended."""


class NotPermitted(ClusterError):
    """401 or 403 from the API itself. Someone must grant the right."""


class KindMissing(ClusterError):
    """The API does not serve this kind: its CRD is not installed."""


class Refused(ClusterError):
    """The API or an admission webhook does not accept the object. A retry of the same object does not help."""


class FieldConflict(ClusterError):
    """Another field manager owns fields that we want to set."""


class PreflightFailed(ClusterError):
    """Something that the deployment needs is not there. The message says what, and how to get it."""


class DeployFailed(ClusterError):
    """An object did not become Ready. The message has the reason and what was found out about it."""


class DeployInProgress(ClusterError):
    """Somebody else deploys this pipeline, or has taken over. A retry helps once that has ended."""


class NothingServes(ClusterError):
    """There is no version to go back to, or no canary to promote. A retry does not help."""
