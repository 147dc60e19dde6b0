"""Failures that commands expect. Each is reported in one line; any other exception keeps its traceback."""

from eventing.problems import Problem
from knative.cluster.errors import ClusterError
from knative.commands.ask import AskFailed
from knative.commands.local_pods import PodsFailed
from knative.commands.manifest_files import ManifestError
from knative.local.autoscaler.revision_settings import SettingsError
from knative.local.errors import LocalError
from knative.render.rendering import RenderFailed
from knative.spec.errors import SpecError, TooManyStages, UnknownShape
from storage.errors import StorageError

_EXPECTED = (
    AskFailed,
    ClusterError,
    LocalError,
    ManifestError,
    PodsFailed,
    Problem,
    RenderFailed,
    SettingsError,
    SpecError,
    StorageError,
    TooManyStages,
    UnknownShape,
)


def one_line(error: Exception) -> str | None:
    """The message to print for an expected failure; None if commands do not expect this exception."""
    if isinstance(error, _EXPECTED):
        return ". ".join([str(error), *getattr(error, "__notes__", ())])
    if isinstance(error, OSError) and error.strerror:  # such as a full disk or a missing permission
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    return None
