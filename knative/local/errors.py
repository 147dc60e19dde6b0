"""Errors of Knative on one machine, one class per condition."""


class LocalError(Exception):
    """Base class of the platform's errors. The message says what was seen and, if a person can help, what to do."""


class ManifestRefused(LocalError):
    """Knative would refuse the manifest as well. The message names Service and fields."""


class UnsupportedManifest(LocalError):
    """Knative accepts the manifest, but the local platform cannot run it. The message names the field."""


class UnknownRevision(LocalError):
    """`spec.traffic` names a revision that does not exist here."""


class PortInUse(LocalError):
    """Another process listens on the port. The message says which port and what to do."""
