"""What the platform on this machine cannot do, apart from the rooms that find out; one class per condition."""


class LocalError(Exception):
    """Base. The message says what was seen and, where a person can, what to do."""


class ManifestRefused(LocalError):
    """Knative would not take the manifest either. The message names Service and fields."""


class UnsupportedManifest(LocalError):
    """Knative accepts it, the local platform has no way to run it. The message names the field."""


class UnknownRevision(LocalError):
    """`spec.traffic` names a revision that does not exist here."""


class PortInUse(LocalError):
    """Another process listens there. The message says which port and what to do."""
